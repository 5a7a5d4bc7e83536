"""The cost of a run before it is run: the forward calls that it would make, and their operations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import share
from ..config import STOCK_STEPS, SpecEditConfig, fitted, resolve
from ..field_checks import first_step
from ..layout import TokenGrid
from ..method.schedule import stages
from .blocks import BlockCount as BlockCount
from .blocks import register_block_count as register_block_count
from .forward import flops_of as flops_of
from .forward import transformer_flops as transformer_flops
from .method_costs import planned_layout, planned_stages
from .modulation import planned_modulation
from .planned_run import PlannedRun, estimated_layouts, given_layouts
from .planned_run import expanded_cells as expanded_cells
from .tables import MODELS, TOKEN_PIXELS, ModelCost


def plan(
    config: SpecEditConfig | str,
    model: str | ModelCost,
    height: int,
    width: int,
    edit_fraction: float | None = None,
    *,
    cells: Tensor | None = None,
    drafts: bool = True,
    strength: float = 1.0,
    num_inference_steps: int | None = None,
) -> dict[str, Any]:
    """Predict the cost of a run without running it, for an image whose reference has the output's size.

    Tokens of a sequence are text + target + reference; the reference takes the target's layout in the draft, coarse
    and mixed stages and is full in the full stage, or always where the model computes it once a run. Per coarse cell:
    one token when locked, four when expanded.

    Args:
        config: a SpecEditConfig or a preset's name. Other methods too, as SpecEditConfig(method="ralu"). Those that
            find what is edited while they run ("spotedit", "regione") need drafts=False, and "sparge" tau=1 or top=1:
            otherwise what they compute is not known beforehand.
        model: a name from `MODELS`, as "flux-kontext" or "flux2-klein-9b", or the ModelCost of another one.
        height, width: output size in pixels, at least 16; rounded down to whole tokens of 16 pixels.
        edit_fraction: share of the coarse cells that are edited (0..1), dilation included. Uniform coverage comes on
            top of it.
        cells: instead of `edit_fraction` the cells that are expanded, bool (h, w) or one mask for each sample
            (B, h, w), as `report.expand_mask`. Then the prediction is exact. Of "spotedit" and "regione" those of
            `report.edit_mask`.
        drafts: whether the run makes a draft, if its configuration needs one; False where the caller gives a mask.
        strength: of an inpainting call, above 0, at most 1. Below 1 the run skips the first steps, and makes no draft.
        num_inference_steps: of the call; None: the configuration's, and the model's own default of stock.

    Returns:
        `nfe`, `flops` (draft included), `flops_stock` (50 full steps), `flops_ratio_50` (these over this run),
        `stock_steps` (those asked for or the model's own default, cut by `strength`) and `flops_ratio` (as many full
        steps over this run), and `stages`: a list of {"name", "steps", "cached", "reused", "tokens", "flops", "calls",
        "groups", "passes"} in order, the draft first, with `tokens` per sequence, `flops` of all the stage's steps and
        guidance passes, and of the steps how many a temporal cache answers and how many run over the target's tokens
        alone. `calls` lists the `ForwardCall`s, and `passes` counts the forward passes of all its `groups` of samples.
        `modulation` has the bytes of the weights that only make scale, shift and gate, and how often they are read: see
        `planned_modulation`.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    config = resolve(config)
    if not isinstance(model, ModelCost) and model not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {model!r}")
    for name, value in (("height", height), ("width", width)):
        if value < TOKEN_PIXELS:
            raise ValueError(f"{name}: expected at least {TOKEN_PIXELS} pixels, got {value!r}")
    cost = model if isinstance(model, ModelCost) else MODELS[model]
    config = fitted(config, skips_tokens=not cost.fixed_reference)
    if num_inference_steps is not None:
        config = config.with_steps(num_inference_steps, masked=not drafts or strength < 1)
    config = config.with_strength(share("strength", strength))
    grid = TokenGrid(int(height) // TOKEN_PIXELS, int(width) // TOKEN_PIXELS)
    mixed = None if cells is None else given_layouts(grid, cells, edit_fraction)
    stock_steps = num_inference_steps or cost.default_steps
    skipped = first_step(stock_steps, strength)
    if (method := config.method_options) is not None:
        others = planned_stages(method, cost, grid, masked=not drafts)
        mixed = mixed or [planned_layout(grid, others, edit_fraction)]
        planned = PlannedRun(config, cost, grid, mixed)
        rows = [planned.method_stage(stage) for stage in others]
    else:
        mixed = mixed or estimated_layouts(config, grid, edit_fraction)
        start = float(cost.stage_sigmas(grid.tokens, 1.0, 0.0, stock_steps)[skipped])
        planned = PlannedRun(config, cost, grid, mixed)
        rows = [planned.draft()] if config.uses_draft and drafts and strength == 1 else []
        rows += [planned.stage(stage, number == 0) for number, stage in enumerate(stages(config, start))]
    flops = sum(row["flops"] for row in rows)
    stock = cost.stock(2 * grid.tokens, STOCK_STEPS, len(mixed))
    return {
        "nfe": config.nfe, "flops": flops, "flops_stock": stock, "flops_ratio_50": stock / flops,
        "stock_steps": stock_steps - skipped,
        "flops_ratio": cost.stock(2 * grid.tokens, stock_steps - skipped, len(mixed)) / flops,
        "stages": rows, "modulation": planned_modulation(cost, rows, len(mixed)),
    }  # fmt: skip
