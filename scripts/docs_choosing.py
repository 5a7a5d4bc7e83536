"""The table of the page on presets: what each preset saves on each model, against the model's own number of steps."""

from docs_readme import FEW_STEPS, SHARE, supported
from docs_results import table

from specedit.config import presets, resolve

MANY = ("quality", "balanced", "fast", "turbo", "ultra")  # for models that run tens of steps
FEW = ("few-4",)  # for models that run few
SIZE = 1024  # px a side


def choosing(name: str) -> str:
    """FLOPs ratios to every model's own steps, with the paper's restore and with the input's latents."""
    from specedit.cost.flops import MODELS

    rows = []
    for model, title, _ in supported():
        steps = MODELS[model].default_steps
        fitting = FEW if steps <= FEW_STEPS else MANY
        saved = [_saved(model, preset) if preset in fitting else "-" for preset in MANY + FEW]
        rows.append([title, str(steps), *saved])
    header = ["model", "its own steps", *(f"`{preset}`" for preset in MANY + FEW)]
    return table(header, rows) + (
        f"\n\nTimes fewer FLOPs than the model's own number of steps at {SIZE} x {SIZE} with one reference, "
        f'{SHARE:.0%} edited: with `restore="full"` / with `restore="reference"`. A single number where the preset '
        "sets its own restore. Predicted by `specedit.flops.plan`, not measured."
    )


def _saved(model: str, preset: str) -> str:
    """What a preset saves, for both restores unless it brings its own."""
    from specedit.cost.flops import plan

    restores = ("full", "reference") if presets[preset].restore == "full" else (presets[preset].restore,)
    runs = [plan(resolve(preset, restore=restore), model, SIZE, SIZE, SHARE) for restore in restores]
    return " / ".join(f"{run['flops_ratio']:.1f}" for run in runs)
