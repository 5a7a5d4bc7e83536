"""The figures of the paper (arXiv 2605.02152), for comparison only."""

# The paper's own figures (arXiv 2605.02152, Table 5, FLUX.1-Kontext-dev on an A100), for comparison only.
PAPER = {"quality": (3.15, 3.31), "balanced": (4.10, 5.38), "fast": (6.40, 6.92), "turbo": (7.05, 7.37)}
# The presets with the paper's exact settings for these rows.
PAPER_PRESETS = {"quality": "paper-30", "balanced": "paper-18", "fast": "paper-11", "turbo": "paper-9"}
# The paper's rows with temporal caches and distilled models (arXiv 2605.02152), likewise.
PAPER_FORECASTS = [
    ["FLUX.1-Kontext", "TaylorSeer, N=6", "50", "3.60x", "5.00x"],
    ["FLUX.1-Kontext", "TaylorSeer, N=9", "50", "4.39x", "-"],
    ["FLUX.1-Kontext", "FORA, N=6", "50", "4.09x", "-"],
    ["FLUX.1-Kontext", "FORA, N=9", "50", "5.83x", "-"],
    ["FLUX.1-Kontext", "SpecEdit + TaylorSeer", "30", "4.39x", "6.70x"],
    ["FLUX.1-Kontext-Lightning", "distilled", "8", "6.09x", "6.25x"],
    ["FLUX.1-Kontext-Lightning", "distilled", "6", "7.89x", "8.33x"],
    ["FLUX.1-Kontext-Lightning", "distilled + SpecEdit", "8", "7.20x", "9.68x"],
    ["FLUX.1-Kontext-Lightning", "distilled + SpecEdit", "6", "9.16x", "13.03x"],
    ["Qwen-Image-Edit", "FORA, N=6", "50", "4.71x", "-"],
    ["Qwen-Image-Edit", "FoCa, N=9", "50", "3.81x", "-"],
    ["Qwen-Image-Edit", "DuCa, N=8", "50", "3.66x", "-"],
    ["Qwen-Image-Edit", "FreqCa, N=5", "50", "3.99x", "-"],
    ["Qwen-Image-Edit", "SpecEdit + FoCa", "18", "6.00x", "6.34x"],
]
# The same on Qwen-Image-Edit (Table 1): clock ratio, and TFLOPs of the run; 50 full steps take QWEN_STOCK.
PAPER_QWEN = {
    "quality": (2.96, 8623.70),
    "balanced": (5.08, 5230.34),
    "fast": (6.04, 3992.31),
    "turbo": (6.43, 2580.52),
}
QWEN_STOCK = 28219.71
PAPERS = {
    "flux-kontext": PAPER,
    "qwen-image-edit": {preset: (clock, QWEN_STOCK / tera) for preset, (clock, tera) in PAPER_QWEN.items()},
}
# The largest clock ratio that other methods' papers report on their own models, against 50 (RegionE: 28) steps.
REPORTED: dict[str, str] = {
    "ralu": "7.0x, FLUX.1-dev",
    "fresco": "10.27x, FLUX.1-dev",
    "bottleneck": "3x, FLUX.1-dev",
    "spotedit": "1.67x, FLUX.1-Kontext; 1.59x, Qwen-Image-Edit",
    "regione": "2.41x, FLUX.1-Kontext; 2.06x, Qwen-Image-Edit",
    "speed": "1.63x, FLUX.1-dev",
}
# ImageReward of FLUX.1-dev by the rows of benchmarks.ablations (arXiv 2601.07462).
FRESCO_ABLATIONS = {"full": 1.0369, "interpolated": 0.9876, "fresh noise": 0.9632, "edges": 0.9482, "random": 0.9143}
