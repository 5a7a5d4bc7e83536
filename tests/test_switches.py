"""Switches of a configuration that go together, and those that do not."""

import pytest

from specedit.config import SpecEditConfig, presets
from specedit.methods import Fresco


def test_switches_are_off_by_default():
    for config in (SpecEditConfig(), *presets.values()):
        assert config.reference_refresh is None and config.guidance_range is None
    assert SpecEditConfig(reference_refresh=4).reference_refresh == 4
    assert SpecEditConfig(guidance_range=[0, 1]).guidance_range == (0.0, 1.0)
    assert hash(SpecEditConfig(guidance_range=[0.2, 0.8])) == hash(SpecEditConfig(guidance_range=(0.2, 0.8)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(reference_refresh=2, forecast="toca"), "reference_refresh: expected None with forecast='toca'.*got 2"),
        (dict(reference_refresh=2, forecast="duca"), "reference_refresh: expected None with forecast='duca'"),
        (dict(reference_refresh=2, attention="stock"), "reference_refresh: .* expected None with attention='stock'"),
        (dict(reference_refresh=2, rope="phase_aligned"), "reference_refresh: .* rope='phase_aligned', got 2"),
        (dict(guidance_range=(0.2, 0.8), forecast="taylor"), "guidance_range: expected None with forecast='taylor'"),
        (dict(draft_steps=0, steps=(0, 3, 3)), r"draft_steps: .*expected at least 1 with steps=\(0, 3, 3\).*got 0"),
        (dict(draft_steps=0, verify_coarse=False), "draft_steps: .* at least 1 with verify_coarse=False, got 0"),
        (dict(restore="pixels", steps=(3, 3, 0)), r"steps: expected at least one full step .* got \(3, 3, 0\)"),
        (dict(restore="pixels", steps=(0, 0, 1)), r"steps: .* at least one step before it, got \(0, 0, 1\)"),
        (dict(restore="pixels", locked="cached"), "locked: expected 'coarse' with restore='pixels'.*got 'cached'"),
        (
            dict(reference_keep=0.2, reference_refresh=2),
            "reference_keep: expected None with reference_refresh=2.*got 0.2",
        ),
        (dict(reference_keep=0.2, locked="cached"), "reference_keep: expected None with locked='cached'"),
        (dict(reference_keep=0.2, forecast="toca"), "reference_keep: expected None with forecast='toca'"),
        (dict(reference_keep=0.2, attention="stock"), "reference_keep: measures SpecEdit's own attention"),
        (dict(reference_keep=0.2, rope="phase_aligned"), "reference_keep: measures .* rope='phase_aligned', got 0.2"),
        (dict(locked="cached", forecast="taylor"), "locked: expected 'coarse' or 'reference' with forecast='taylor'"),
        (dict(locked="cached", reference_refresh=2), "locked: .*'reference' with reference_refresh=2, got 'cached'"),
        (dict(locked="cached", attention="stock"), "locked: keeps .* expected 'coarse' or 'reference' with attention"),
        (dict(locked="cached", rope="phase_aligned"), "locked: keeps .* rope='phase_aligned', got 'cached'"),
        (dict(locked="reference", selector="edges"), "locked: expected 'coarse' with selector='edges' and restore="),
        (dict(draft_steps=0, draft_condition="small"), "draft_condition: expected 'full' with draft_steps=0"),
        (dict(draft_steps=0, draft_scale=2), "draft_scale: expected the default 4 with draft_steps=0.*got 2"),
        (dict(selector="uniform", uniform_stride=0), "uniform_stride: expected at least 1 with selector='uniform'"),
    ],
)
def test_switches_that_do_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        SpecEditConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "finds", "drafts", "reads"),
    [
        ({}, True, True, "features"),
        ({"draft_steps": 0}, True, False, "features"),
        ({"draft_steps": 0, "steps": (0, 0, 4)}, False, False, None),
        ({"selector": "edges"}, True, True, "picture"),
        ({"method": "regione"}, False, False, None),
        ({"method": "spotedit"}, False, False, "features"),
        ({"method": "fresco"}, False, False, None),
        ({"method": Fresco(select="edges")}, False, False, "picture"),
        ({"method": "steps", "keep_pixels": True}, False, False, None),
    ],
    ids=str,
)
def test_what_a_run_looks_for_and_reads(fields, finds, drafts, reads):
    config = SpecEditConfig(**fields)
    assert (config.finds_cells, config.uses_draft, config.needs_decoder(masked=False)) == (finds, drafts, reads)
    own = "method" not in fields
    assert config.needs_decoder(masked=True) == (None if own else reads)
    assert config.verifies_coarse or not (finds and not drafts)


@pytest.mark.parametrize("fields", [{"draft_steps": 0}, {"locked": "cached"}, {"reference_keep": 0.2}], ids=str)
def test_switches_that_another_method_does_not_read(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"^{name}: expected the default, .* with method='spotedit', .* got "):
        SpecEditConfig(method="spotedit", **fields)
