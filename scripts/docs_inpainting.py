"""The table of what inpainting saves at each strength."""

from docs_results import table

PIPELINES = {
    "FluxKontextInpaintPipeline": ("flux-kontext", 28), "QwenImageEditInpaintPipeline": ("qwen-image-edit", 50),
    "Flux2KleinInpaintPipeline": ("flux2-klein-9b", 4),
}  # fmt: skip
STRENGTHS = (1.0, 0.8, 0.6, 0.4)
SHARE = 0.2  # of the picture, under the mask


def inpainting(name: str) -> str:
    """FLOPs ratios to the stock call of the same strength and steps."""
    from specedit.config import resolve
    from specedit.cost.flops import plan as predict

    rows = []
    for pipeline, (model, steps) in PIPELINES.items():
        preset = "few-4" if steps <= 4 else "turbo"
        config = resolve(preset, restore="reference", locked="cached", uniform_stride=0)
        runs = [predict(config, model, 1024, 1024, SHARE, drafts=False, strength=strength) for strength in STRENGTHS]
        saved = [f"{run['flops_ratio']:.1f}x ({run['nfe']} of {run['stock_steps']})" for run in runs]
        rows.append([f"`{pipeline}`", str(steps), f"`{preset}`", *saved])
    header = ["pipeline", "stock's steps", "preset", *(f"strength {s:g}" for s in STRENGTHS)]
    return table(header, rows) + (
        f"\n\nFLOPs saved against the stock call with the same strength at 1024 x 1024, {SHARE:.0%} under the mask, "
        '`restore="reference"`, `locked="cached"`. In brackets the steps taken, and stock\'s. Predicted by '
        "`specedit.flops.plan`, not measured."
    )
