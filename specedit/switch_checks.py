"""Switches of `SpecEditConfig` that go together, and those that do not."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from . import registry
from .field_checks import taken_steps
from .forecast_options import FIRST_FULL, INTERVAL, ForecastOptions

if TYPE_CHECKING:
    from .config import SpecEditConfig
    from .method_options import Method

Steps = tuple[int, int, int]
# Fields that no method ignores.
READ_BY_ALL = frozenset(("method", "attention", "keep_pixels", "reuse_encodings", "decode", "modulation"))


def finds_cells(config: SpecEditConfig, steps: Steps) -> bool:
    """Whether a run of `steps` without a caller's edit_mask looks for what is edited. Another method does so itself."""
    if config.method_options is not None:
        return False
    decides = taken_steps(steps, config.restore)[1] > 0 or config.keep_pixels
    return bool(registry.selectors[config.selector].needs_draft) and decides


def stage_lengths(config: SpecEditConfig, steps: Steps) -> list[int]:
    """The steps of every stage that has any."""
    return [n for n in taken_steps(steps, config.restore) if n]


def can_forecast(config: SpecEditConfig, steps: Steps) -> bool:
    """Whether some stage has steps beyond those that come before its first forecast."""
    options = config.forecast_options
    assert options is not None
    return any(n > options.warmup(first=i == 0) for i, n in enumerate(stage_lengths(config, steps)))


def check(config: SpecEditConfig) -> None:
    """ValueError naming the field, what was expected and what came."""
    if config.method_options is not None:
        _check_method(config, config.method_options)
    if config.forecast_options is not None:
        _check_forecast(config, config.forecast_options)
    if config.decode == "edited" and not config.keep_pixels:
        raise ValueError(
            "decode: expected 'full' without keep_pixels, because pixels outside the edited cells are shown too, "
            "got 'edited'"
        )
    if config.selector == "uniform" and not config.uniform_stride and config.steps[1] > 0:
        raise ValueError(
            "uniform_stride: expected at least 1 with selector='uniform', whose mixed stage expands nothing else, got "
            f"{config.uniform_stride}"
        )
    if config.draft_steps == 0:
        _check_no_draft(config)
    if config.reference_refresh is not None:
        _check_reference_refresh(config)
    if config.locked != "coarse":
        _check_locked(config)
    if config.reference_keep is not None:
        _check_reference_keep(config)


def check_restore(config: SpecEditConfig, default_sigma: float) -> None:
    """Likewise of `restore`, before anything counts the stages' steps."""
    if config.restore != "pixels":
        if config.pixel_restore_sigma != default_sigma:
            raise ValueError(
                f"pixel_restore_sigma: expected the default {default_sigma} with restore={config.restore!r}, "
                f"got {config.pixel_restore_sigma}"
            )
    elif config.steps[2] == 0 or sum(config.steps) == 1:
        raise ValueError(
            "steps: expected at least one full step with restore='pixels', and at least one step before it, got "
            f"{config.steps}"
        )
    elif config.locked != "coarse":
        raise ValueError(
            "locked: expected 'coarse' with restore='pixels', which upsamples what the mixed sequence makes of locked "
            f"cells, got {config.locked!r}"
        )


def check_fewer_steps(config: SpecEditConfig, steps: Steps) -> None:
    """ValueError where a call leaves too few `steps` to a configuration."""
    if config.restore == "pixels" and sum(steps) == 1:
        raise ValueError("num_inference_steps: expected at least 2 with restore='pixels', got 1")


def lacks_finder(config: SpecEditConfig, steps: Steps) -> bool:
    """Whether `steps` leave no coarse stage to a configuration without a draft, which has to find what is edited."""
    return config.draft_steps == 0 and steps[0] == 0 and finds_cells(config, steps)


def _check_method(config: SpecEditConfig, method: Method) -> None:
    default = type(config)()
    for field in fields(config):
        value, expected = getattr(config, field.name), getattr(default, field.name)
        if field.name not in method.uses | READ_BY_ALL and value != expected:
            raise ValueError(
                f"{field.name}: expected the default, {expected!r}, with method={method.name!r}, which does not read "
                f"it, got {value!r}"
            )
    if method.own_attention and config.attention == "stock":
        raise ValueError(
            f"attention: expected 'auto', 'triton' or 'torch' with method={method.name!r}, which needs SpecEdit's own "
            "attention, got 'stock'"
        )
    if method.lists_blocks and config.attention == "merged":
        raise ValueError(
            f"attention: expected 'auto', 'triton' or 'torch' with method={method.name!r}, which skips blocks of keys, "
            "got 'merged'"
        )


def _check_forecast(config: SpecEditConfig, options: ForecastOptions) -> None:
    if options.token_wise and (config.attention == "stock" or config.rope == "phase_aligned"):
        raise ValueError(
            f"forecast: {options.name!r} keeps keys and values of SpecEdit's own attention with scaled positions, "
            f"expected another forecast with attention={config.attention!r} and rope={config.rope!r}"
        )
    if not can_forecast(config, config.steps):
        raise ValueError(
            f"forecast: {options.name!r} needs {options.history} full steps before its first forecast, in "
            f"the run's first stage at least {FIRST_FULL}, expected a stage of more steps, got steps={config.steps}; "
            "take more steps or a lower order"
        )
    longest = max(stage_lengths(config, config.steps))
    if options.interval > longest and (config.forecast_interval is not None or options.interval != INTERVAL):
        raise ValueError(
            f"forecast_interval: expected at most {longest}, the steps of the longest stage of steps={config.steps}, "
            f"got {options.interval}"
        )


def _check_no_draft(config: SpecEditConfig) -> None:
    if config.draft_condition != "full":
        raise ValueError(
            f"draft_condition: expected 'full' with draft_steps=0, which makes no draft, got {config.draft_condition!r}"
        )
    if config.draft_scale != type(config).draft_scale:
        raise ValueError(
            f"draft_scale: expected the default {type(config).draft_scale} with draft_steps=0, which makes no draft, "
            f"got {config.draft_scale}"
        )
    # The registry last, here and below: presets are made before selectors can be imported.
    if (config.steps[0] > 0 and config.verify_coarse) or not finds_cells(config, config.steps):
        return
    expected = "draft_steps: 0 has the coarse stage verify itself, expected at least 1 with"
    if config.steps[0] == 0:
        raise ValueError(f"{expected} steps={config.steps}, which has no coarse step, got 0")
    if not config.verify_coarse:
        raise ValueError(f"{expected} verify_coarse=False, got 0")


def _check_reference_refresh(config: SpecEditConfig) -> None:
    if config.forecast_options is not None and config.forecast_options.token_wise:
        raise ValueError(
            f"reference_refresh: expected None with forecast={config.forecast!r}, which keeps the reference's keys "
            f"and values by itself, got {config.reference_refresh}"
        )
    _check_own_attention(config, "reference_refresh", "None", "keeps keys and values of")


def _check_locked(config: SpecEditConfig) -> None:
    if not (config.restore == "reference" or config.keep_pixels or registry.selectors[config.selector].verifies):
        raise ValueError(
            f"locked: expected 'coarse' with selector={config.selector!r} and restore={config.restore!r}, because "
            f"cells that this selector leaves out may change as well, got {config.locked!r}"
        )
    if config.locked == "reference":
        return
    for name in ("forecast", "reference_refresh"):
        if (value := getattr(config, name)) is not None:
            raise ValueError(f"locked: expected 'coarse' or 'reference' with {name}={value!r}, got 'cached'")
    _check_own_attention(config, "locked", "'coarse' or 'reference'", "keeps keys and values of")


def _check_reference_keep(config: SpecEditConfig) -> None:
    options = config.forecast_options
    keeps = {
        "reference_refresh": config.reference_refresh is not None, "locked": config.locked == "cached",
        "forecast": options is not None and options.token_wise,
    }  # fmt: skip
    for name, conflict in keeps.items():
        if conflict:
            raise ValueError(
                f"reference_keep: expected None with {name}={getattr(config, name)!r}, which keeps keys and values of "
                f"the whole reference, got {config.reference_keep}"
            )
    _check_own_attention(config, "reference_keep", "None", "measures")


def _check_own_attention(config: SpecEditConfig, field: str, expected: str, what: str) -> None:
    """ValueError unless attention is SpecEdit's own, with scaled positions."""
    if config.attention == "stock" or config.rope == "phase_aligned":
        raise ValueError(
            f"{field}: {what} SpecEdit's own attention with scaled positions, expected {expected} with "
            f"attention={config.attention!r} and rope={config.rope!r}, got {getattr(config, field)!r}"
        )
