"""Timesteps that are known before a run, and the modulation that they have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from ..once import warn_once
from .adapter import Run
from .schedule import stages


def known_sigmas(run: Run, drafts: bool) -> list[float]:
    """Sigmas of the steps whose layouts are known before the run: those of the draft, if it makes one, and of the
    coarse and the full stage. The mixed stage's follow its number of tokens, and so what is edited."""
    grid, config = run.state.grid, run.config

    def sigmas(tokens: int, start: float, end: float, steps: int) -> list[float]:
        each: list[float] = run.adapter.sigmas(run.pipe, tokens, start, end, steps).tolist()
        return each[:-1]

    found = sigmas(grid.coarse(config.draft_scale).tokens, 1.0, 0.0, config.draft_steps) if drafts else []
    tokens = {"coarse": grid.coarse().tokens, "full": grid.tokens}
    for stage in stages(config, run.state.start):
        if stage.name in tokens:
            found += sigmas(tokens[stage.name], stage.start, stage.end, stage.steps)
    return found


def modulated(run: Run, drafts: bool) -> AbstractContextManager[None]:
    """Inside, the run computes its modulation as its configuration says, or stands aside with one warning."""
    if run.config.modulation == "step":
        return nullcontext()
    reason = why_every_step(run)
    if reason is not None:
        warn_once(run.pipe, f"modulation='once' has no effect: {reason}")
        return nullcontext()
    own = run.config.method_options is None
    return run.adapter.modulated_once(run, known_sigmas(run, drafts) if own else [])


def why_every_step(run: Run) -> str | None:
    """Why a run cannot keep its modulation (one phrase), or None."""
    if run.trace.callback is not None:
        return "callback_on_step_end may change the transformer between steps"
    return run.adapter.why_modulated_every_step(run.pipe)
