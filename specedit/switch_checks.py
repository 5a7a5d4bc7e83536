"""Switches of `SpecEditConfig` that go together, and those that do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import registry
from .field_checks import taken_steps

if TYPE_CHECKING:
    from .config import SpecEditConfig

Steps = tuple[int, int, int]


def finds_cells(config: SpecEditConfig, steps: Steps) -> bool:
    """Whether a run of `steps` without a caller's edit_mask looks for what is edited."""
    decides = taken_steps(steps, config.restore)[1] > 0 or config.keep_pixels
    return bool(registry.selectors[config.selector].needs_draft) and decides


def check(config: SpecEditConfig) -> None:
    """ValueError naming the field, what was expected and what came."""
    if config.draft_steps == 0:
        _check_no_draft(config)


def check_fewer_steps(config: SpecEditConfig, steps: Steps) -> None:
    """ValueError where a call leaves too few `steps` to a configuration."""
    if config.draft_steps == 0 and steps[0] == 0 and finds_cells(config, steps):
        least = sum(n > 0 for n in config.steps)
        raise ValueError(
            f"num_inference_steps: expected at least {least} with draft_steps=0, whose coarse stage verifies itself, "
            f"got {sum(steps)}"
        )


def _check_no_draft(config: SpecEditConfig) -> None:
    if config.draft_condition != "full":
        raise ValueError(
            f"draft_condition: expected 'full' with draft_steps=0, which makes no draft, got {config.draft_condition!r}"
        )
    if not finds_cells(config, config.steps):
        return
    expected = "draft_steps: 0 has the coarse stage verify itself, expected at least 1 with"
    if config.steps[0] == 0:
        raise ValueError(f"{expected} steps={config.steps}, which has no coarse step, got 0")
    if not config.verify_coarse:
        raise ValueError(f"{expected} verify_coarse=False, got 0")
