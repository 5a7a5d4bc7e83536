import ast
import copy
import dataclasses
import itertools
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specedit.config import DEFAULT_PRESET, SpecEditConfig, fitted, presets, resolve
from specedit.registry import forecasts

steps = st.tuples(*[st.integers(0, 20)] * 3).filter(sum)


def test_defaults():
    config = SpecEditConfig()
    assert config.steps == (7, 6, 5) and config.boundaries == (0.8, 0.65)
    assert (config.draft_steps, config.draft_scale) == (4, 4)
    assert (config.threshold, config.verify_at) == (0.2, "draft")
    assert (config.dilation, config.uniform_stride, config.selector) == (1, 3, "semantic")
    assert (config.restore, config.key_bias, config.rope, config.attention) == ("full", "area", "scaled", "auto")
    assert config.keep_pixels is False and config.verify_coarse is True
    assert config == presets["balanced"] == resolve() and config.name == "balanced"


def test_presets_nfe():
    assert {name: config.nfe for name, config in presets.items()} == {
        "quality": 30,
        "balanced": 18,
        "fast": 11,
        "turbo": 9,
        "ultra": 9,
        "few-8": 8,
        "few-4": 4,
        "lightning-8": 8,
        "lightning-6": 6,
        "paper": 18,
        "paper-30": 30,
        "paper-18": 18,
        "paper-11": 11,
        "paper-9": 9,
    }
    assert presets["ultra"].verifies_coarse and not presets["ultra"].uses_draft
    assert presets["few-8"].draft_steps == presets["few-4"].draft_steps == 2
    assert presets["lightning-8"].draft_steps == presets["lightning-6"].draft_steps == 4
    for name, config in presets.items():
        assert SpecEditConfig.preset(name) is config and config.name == name.removesuffix("-18")
    assert SpecEditConfig(dilation=5).name == "balanced, dilation=5"


def test_the_paper_presets_add_nothing_to_the_paper():
    cheap = {30: 22, 18: 13, 11: 6, 9: 4}  # coarse and mixed steps behind the FLOPs of its tables
    for nfe, count in cheap.items():
        config = presets[f"paper-{nfe}"]
        assert (config.nfe, sum(config.steps[:2])) == (nfe, count)
        assert (config.verify_at, config.threshold, config.restore) == ("full", 0.75, "full")
        assert (config.draft_steps, config.draft_scale, config.uniform_stride, config.dilation) == (8, 4, 3, 0)
        assert config.boundaries == (0.7, 0.55)
        assert (config.key_bias, config.rope, config.selector) == ("none", "scaled", "semantic")
        assert not (config.keep_pixels or config.verify_coarse or config.forecast or config.guidance_range)
    assert presets["paper"] == presets["paper-18"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("second_look", False, "second_look is now verify_coarse"),
        ("couple_noise", True, "couple_noise was removed"),
        ("cfg", "separate", "cfg was removed"),
    ],
)
def test_former_fields_say_what_became_of_them(field, value, message):
    config = SpecEditConfig()
    for make in (SpecEditConfig, partial(resolve, "turbo"), partial(dataclasses.replace, config)):
        with pytest.raises(TypeError, match=message):
            make(**{field: value})


def test_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SpecEditConfig().steps = (1, 1, 1)
    assert hash(SpecEditConfig(steps=[7, 6, 5], boundaries=[0.8, 0.65])) == hash(SpecEditConfig())


def test_threshold_default_follows_verify_at():
    assert SpecEditConfig(verify_at="draft").threshold == 0.2
    assert SpecEditConfig(verify_at="draft", threshold=0.3).threshold == 0.3
    assert resolve("turbo", verify_at="full").threshold == 0.75
    assert resolve(SpecEditConfig(), verify_at="full").threshold == 0.75
    assert resolve("paper", verify_at="draft").threshold == 0.2
    assert resolve(SpecEditConfig(threshold=0.3), verify_at="full").threshold == 0.3
    assert resolve("turbo", verify_at="draft", threshold=0.75).threshold == 0.75


def test_uniform_stride_none_is_zero():
    assert SpecEditConfig(uniform_stride=None).uniform_stride == 0
    assert SpecEditConfig(uniform_stride=0) == SpecEditConfig(uniform_stride=None)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("steps", (1, 2), ValueError),
        ("steps", (0, 0, 0), ValueError),
        ("steps", (1, -1, 2), ValueError),
        ("steps", (1.5, 1, 2), TypeError),
        ("steps", (True, 1, 2), TypeError),
        ("steps", 9, TypeError),
        ("boundaries", (0.7,), ValueError),
        ("boundaries", (1.0, 0.5), ValueError),
        ("boundaries", (0.0, 0.0), ValueError),
        ("boundaries", (0.5, 2 / 3), ValueError),  # 2*s1/(1+s1) itself leaves the mixed stage no interval
        ("boundaries", (0.5, float("nan")), ValueError),
        ("boundaries", ("0.7", 0.5), TypeError),
        ("draft_steps", -1, ValueError),
        ("draft_steps", 2.0, TypeError),
        ("draft_scale", 3, ValueError),
        ("draft_scale", "4", TypeError),
        ("threshold", -0.1, ValueError),
        ("threshold", 4.5, ValueError),
        ("threshold", float("nan"), ValueError),
        ("threshold", "0.75", TypeError),
        ("verify_at", "latent", ValueError),
        ("dilation", -1, ValueError),
        ("dilation", 0.5, TypeError),
        ("uniform_stride", -3, ValueError),
        ("selector", None, ValueError),
        ("restore", True, ValueError),
        ("reference_keep", 0, ValueError),
        ("reference_keep", 1.01, ValueError),
        ("reference_keep", float("nan"), ValueError),
        ("reference_keep", "0.15", TypeError),
        ("pixel_restore_sigma", 0, ValueError),
        ("pixel_restore_sigma", 1.0, ValueError),
        ("pixel_restore_sigma", float("nan"), ValueError),
        ("pixel_restore_sigma", "0.12", TypeError),
        ("pixel_restore_sigma", 0.2, ValueError),  # nothing is restored from pixels
        ("locked", "skipped", ValueError),
        ("locked", None, ValueError),
        ("keep_pixels", 1, TypeError),
        ("verify_coarse", None, TypeError),
        ("key_bias", "log4", ValueError),
        ("rope", "", ValueError),
        ("attention", "flash", ValueError),
        ("draft_condition", "tiny", ValueError),
        ("draft_condition", None, ValueError),
        ("reference_refresh", 0, ValueError),
        ("reference_refresh", 2.5, TypeError),
        ("reference_refresh", True, TypeError),
        ("guidance_range", 0.5, TypeError),
        ("guidance_range", (0.5,), ValueError),
        ("guidance_range", (0.8, 0.2), ValueError),
        ("guidance_range", (0.5, 0.5), ValueError),
        ("guidance_range", (-0.1, 0.5), ValueError),
        ("guidance_range", (0.5, 1.1), ValueError),
        ("guidance_range", (0.2, float("nan")), ValueError),
        ("guidance_range", ("0.2", 0.5), TypeError),
    ],
)
def test_wrong_values_name_field_expectation_and_value(field, value, error):
    with pytest.raises(error) as caught:
        SpecEditConfig(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field}: expected") and "got" in message


def test_typos_get_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'balanced'"):
        resolve("balancd")
    with pytest.raises(ValueError, match="did you mean 'semantic'"):
        SpecEditConfig(selector="semantics")
    with pytest.raises(TypeError, match="did you mean 'threshold'"):
        resolve("turbo", treshold=0.5)
    with pytest.raises(TypeError, match="the fields are steps"):
        resolve("turbo", zzz=1)


def test_resolve():
    assert resolve() is resolve(None) is presets[DEFAULT_PRESET]
    config = SpecEditConfig(dilation=2)
    assert resolve(config) is config
    changed = resolve("turbo", restore="reference")
    assert changed.restore == "reference" and changed.steps == (2, 2, 5)
    assert presets["turbo"].restore == "full"
    with pytest.raises(ValueError, match="threshold"):
        resolve("turbo", threshold=9)
    for wrong in (18, {"steps": (1, 1, 1)}, SpecEditConfig):
        with pytest.raises(TypeError, match="expected a preset name"):
            resolve(wrong)


@given(steps, st.integers(1, 120))
def test_with_steps_proportions(steps, n):
    scaled = SpecEditConfig(steps=steps).with_steps(n).steps
    active = [i for i in range(3) if steps[i]]
    assert sum(scaled) == n
    assert all(scaled[i] == 0 for i in range(3) if not steps[i])
    if n >= len(active):
        assert all(scaled[i] >= 1 for i in active)
    # Nobody is a whole step from its share, except where a stage was raised to its one step.
    shares = [n * steps[i] / sum(steps) for i in range(3)]
    if all(share >= 1 for share in shares if share):
        assert all(abs(scaled[i] - shares[i]) < 1 for i in range(3))


def test_with_steps():
    assert all(config.with_steps(config.nfe) == config for config in presets.values())
    assert presets["balanced"].with_steps(36).steps == (14, 12, 10)
    assert presets["quality"].with_steps(1).steps == (0, 0, 1)
    assert presets["quality"].with_steps(2).steps == (0, 1, 1)
    assert presets["quality"].with_steps(3).steps == (1, 1, 1)
    assert SpecEditConfig(steps=(0, 0, 5)).with_steps(50).steps == (0, 0, 50)
    assert SpecEditConfig(threshold=0.1, restore="reference").with_steps(9).threshold == 0.1
    for wrong, error in ((0, ValueError), (-4, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="num_inference_steps"):
            presets["fast"].with_steps(wrong)


def test_uses_draft():
    assert {name for name, config in presets.items() if not config.uses_draft} == {"ultra"}
    assert SpecEditConfig(selector="edges").uses_draft  # its edges are those of the prediction
    assert not SpecEditConfig(selector="uniform").uses_draft
    assert not SpecEditConfig(steps=(4, 0, 5)).uses_draft
    assert SpecEditConfig(steps=(4, 0, 5), restore="reference").uses_draft
    assert SpecEditConfig(steps=(0, 0, 5), keep_pixels=True).uses_draft
    assert not SpecEditConfig(steps=(4, 0, 0), restore="reference").uses_draft


def test_coarse_stage_is_verified_where_cells_are_kept():
    keeping = [SpecEditConfig(restore="reference"), SpecEditConfig(keep_pixels=True)]
    assert all(config.preserves_unedited and config.verifies_coarse for config in keeping)
    assert not SpecEditConfig().preserves_unedited and not SpecEditConfig().verifies_coarse
    for change in ({"verify_coarse": False}, {"selector": "edges"}, {"steps": (0, 3, 3)}):
        config = SpecEditConfig(restore="reference", **change)
        assert config.preserves_unedited and not config.verifies_coarse


# --------------------------------------------------------------------------------------------------- temporal caches


def test_forecast_defaults():
    config = SpecEditConfig(forecast="taylor")
    assert (config.forecast_options.interval, config.forecast_options.history) == (4, 3)
    histories = {"reuse": 1, "taylor": 3, "hermite": 3, "foca": 2, "freqca": 3, "toca": 1, "duca": 1, "lesa": 3}
    assert {name: SpecEditConfig(forecast=name).forecast_options.history for name in forecasts} == histories
    assert SpecEditConfig(forecast="taylor", forecast_order=1, forecast_interval=6).forecast_options.history == 2
    assert SpecEditConfig().forecast is None and all(config.forecast is None for config in presets.values())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(forecast="tailor"), ValueError, "forecast: expected None or one of .* did you mean 'taylor'"),
        (dict(forecast=3), ValueError, "forecast: expected None or one of"),
        (dict(forecast_order=2), ValueError, "forecast_order: expected None without a forecast, got 2"),
        (dict(forecast_interval=4), ValueError, "forecast_interval: expected None without a forecast, got 4"),
        (dict(forecast="taylor", forecast_order=0), ValueError, "forecast_order: expected an integer of at least 1"),
        (dict(forecast="taylor", forecast_order=1.5), TypeError, "forecast_order: expected an integer of at least 1"),
        (dict(forecast="reuse", forecast_order=1), ValueError, "forecast='reuse' has no order, got 1"),
        (dict(forecast="foca", forecast_order=2), ValueError, "forecast='foca' has no order, got 2"),
        (
            dict(forecast="reuse", forecast_interval=1),
            ValueError,
            "forecast_interval: expected an integer of at least 2",
        ),
        (dict(forecast="reuse", forecast_interval=True), TypeError, "forecast_interval: expected an integer"),
        (dict(forecast="taylor", forecast_order=6), ValueError, r"needs 7 full steps.*steps=\(7, 6, 5\)"),
        (dict(forecast="taylor", steps=(0, 0, 3)), ValueError, "needs 3 full steps before its first forecast"),
        (
            dict(forecast="reuse", steps=(0, 0, 3)),
            ValueError,
            "in the run's first stage at least 3, expected",
        ),
        (dict(forecast="reuse", forecast_interval=8), ValueError, "forecast_interval: expected at most 7"),
        (dict(forecast="toca", attention="stock"), ValueError, "'toca' keeps keys and values of SpecEdit's own"),
        (dict(forecast="duca", rope="phase_aligned"), ValueError, "'duca' keeps keys and values of SpecEdit's own"),
        (dict(forecast="taylor", forecast_weights="w"), ValueError, "^forecast_weights: expected None, .* no weights"),
        (dict(forecast="lesa", forecast_weights=3), TypeError, "forecast_weights: expected a file name or None, got 3"),
    ],
)
def test_forecasts_that_make_no_sense(fields, error, message):
    with pytest.raises(error, match=message):
        SpecEditConfig(**fields)


def test_a_merged_last_stage_counts_as_one():
    fields = dict(steps=(0, 2, 3), forecast="taylor", forecast_order=3)
    with pytest.raises(ValueError, match="needs 4 full steps"):
        SpecEditConfig(**fields)
    assert SpecEditConfig(**fields, restore="reference").forecast_options.history == 4


def test_an_interval_beyond_a_calls_stages_becomes_the_longest_stage():
    config = SpecEditConfig(forecast="reuse", forecast_interval=6)
    fewer = config.with_steps(9)
    assert fewer.steps == (4, 3, 2) and fewer.forecast == "reuse" and fewer.forecast_interval == 4
    assert config.with_steps(18) == config


@pytest.mark.parametrize("n", [1, 4, 9])
def test_a_call_of_too_few_steps_runs_without_its_forecast(n):
    plain = SpecEditConfig(reference_refresh=2)
    config = SpecEditConfig(forecast="taylor", forecast_interval=4, forecast_order=3, reference_refresh=2)
    assert config.with_steps(n) == plain.with_steps(n)
    assert config.with_steps(18) == config
    with pytest.raises(ValueError, match="'taylor' needs 4 full steps"):  # as a configuration it stays an error
        SpecEditConfig(steps=plain.with_steps(n).steps, forecast="taylor", forecast_order=3)


# ------------------------------------------------------------------------------------------ approximate, by a switch


# ------------------------------------------------------------------------------------------------------ the guide


def table(heading):
    """The rows under a table's head in docs/guide.md, their cells without backticks."""
    lines = (Path(__file__).parents[1] / "docs" / "guide.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading)) + 2
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    return [[cell.strip().strip("`") for cell in row.strip("|").split(" | ")] for row in rows]


def test_the_guide_has_every_field_with_its_default():
    rows = {name: default for name, default, *_ in table("| field | default |")}
    fields = {field.name: field.default for field in dataclasses.fields(SpecEditConfig)}
    assert {name: ast.literal_eval(default) for name, default in rows.items()} == fields


def test_the_guide_has_every_preset():
    rows = {name: [ast.literal_eval(cell) for cell in cells] for name, *cells in table("| preset |")}
    assert rows == {name: [preset.steps, preset.draft_steps] for name, preset in presets.items()}
    own = {(preset.verify_at, preset.threshold) for name, preset in presets.items() if not name.startswith("paper")}
    assert own == {("draft", 0.2)}


def test_a_configuration_keeps_its_presets_name():
    assert resolve("turbo", restore="reference", keep_pixels=True).name == (
        "turbo, restore='reference', keep_pixels=True"
    )
    assert resolve(resolve("fast", dilation=2), threshold=0.3).name == "fast, threshold=0.3, dilation=2"
    assert resolve("fast", dilation=presets["fast"].dilation).name == "fast"
    assert resolve("fast", verify_at="full").name == "fast, verify_at='full'"  # the threshold only follows
    assert resolve("fast", restore="reference").with_steps(4).name == "fast, steps=(1, 1, 2), restore='reference'"
    # Not the steps of another preset that happen to be nearer.
    assert resolve("quality", steps=(2, 3, 5)).name == "quality, steps=(2, 3, 5)"
    assert resolve("quality", steps=presets["turbo"].steps).name == "turbo"
    assert dataclasses.replace(presets["turbo"], restore="reference").name == "turbo, restore='reference'"
    five = dict(restore="reference", keep_pixels=True, dilation=3, uniform_stride=0, draft_steps=3)
    assert resolve("turbo", **five).name == "custom"
    for config in (resolve("turbo", dilation=2), resolve("fast", steps=(2, 2, 5), dilation=2)):
        assert config == dataclasses.replace(presets["turbo"], dilation=2) and hash(config) == hash(
            dataclasses.replace(presets["turbo"], dilation=2)
        )
        assert copy.deepcopy(config).name == config.name


def test_presets_leave_cells_out_where_tokens_cannot_be_kept():
    """A model that cannot compute some target tokens alone still runs every preset."""
    ultra = presets["ultra"]
    assert fitted(ultra, skips_tokens=True) is ultra
    other = fitted(resolve("ultra", dilation=2), skips_tokens=False)
    assert (other.locked, other.dilation, other.draft_steps) == ("reference", 2, 0)
    assert other.name == "ultra, dilation=2, locked='reference'"
    asked = resolve("turbo", locked="cached", restore="reference")
    assert fitted(asked, skips_tokens=False) is asked  # which the model then refuses
