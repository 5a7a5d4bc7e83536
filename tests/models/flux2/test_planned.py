"""A plan for the cells that were found counts what the report counts, to the digit, in every preset and restore."""

import numpy as np
import pytest
import torch

import specedit
from specedit.cost.flops import plan
from specedit.cost.tables import ModelCost
from specedit.models import flux2

if flux2.Flux2Klein is None:
    pytest.skip("this diffusers has no FLUX.2-klein", allow_module_level=True)

from specedit.models.flux2.schedule import flux2_sigmas
from tests.models.planned import assert_as_planned, presets_and_restores

CORNER = np.zeros((128, 128), dtype=bool)
CORNER[:40, :30] = True


@pytest.fixture
def compare():
    """Runs a call, and compares its report with the plan for the cells that it found."""

    def check(family, pipe, mask=None, call=None, **config):
        specedit.install(pipe, **dict(threshold=0.9, dilation=0) | config)
        output = pipe(**family.call(128, 128) | dict(output_type="latent", edit_mask=mask) | (call or {}))
        report = output.report
        cost = ModelCost(
            pipe.transformer.config, 16, 2 if "guidance_scale" in (call or {}) else 1, sigmas=flux2_sigmas,
            scheduler=pipe.scheduler.config, fixed_reference=family.adapter.fixed_reference,
        )  # fmt: skip
        cells = torch.ones(4, 4, dtype=torch.bool) if report.expand_mask is None else report.expand_mask
        planned = plan(report.config, cost, 128, 128, cells=cells, drafts=mask is None)
        assert_as_planned(report, planned)
        steps = report.stock_steps
        assert report.flops_stock == pytest.approx(cost.stock(2 * 64, steps), rel=1e-12)
        return report

    return check


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first", "turn"), [("Flux2KleinPipeline", "full", 2), ("Flux2KleinKVPipeline", "reference", 0)]
)
def test_presets(compare, family_of, name, first, turn):
    family = family_of(name)
    pipe = family.make()
    for preset, restore in presets_and_restores(first, turn):
        compare(family, pipe, CORNER, config=preset, restore=restore)
    for restore in ("full", "reference"):
        compare(family, pipe, config="turbo", restore=restore)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        dict(reference_refresh=2, steps=(3, 3, 2)),
        dict(forecast="taylor", forecast_order=1, forecast_interval=3, steps=(0, 0, 9)),
        dict(forecast="reuse", reference_refresh=3),
        dict(attention="stock"),
        dict(verify_coarse=False, keep_pixels=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["Flux2KleinPipeline", "Flux2KleinKVPipeline"])
def test_options(compare, family_of, name, config):
    family = family_of(name)
    compare(family, family.make(), CORNER, **config)


@pytest.mark.slow
def test_guidance_range_follows_the_models_own_schedule(compare, family_of):
    family = family_of()
    pipe = family.make()
    for bounds in ((0.4, 0.8), (0.62, 0.9), (0.5, 0.6)):
        compare(family, pipe, CORNER, dict(guidance_scale=2.5), guidance_range=bounds, steps=(3, 4, 3))
    compare(family, pipe, CORNER, forecast="toca", forecast_interval=4)


def test_kept_references_cost_less(family_of):
    """Against its own stock, and against the same transformer that computes them in every step."""
    reports = []
    for name in ("Flux2KleinPipeline", "Flux2KleinKVPipeline"):
        family = family_of(name)
        pipe = specedit.install(family.make(), steps=(0, 2, 2))
        family.run(pipe, edit_mask=CORNER, num_inference_steps=4)
        reports.append(specedit.report(pipe))
    klein, kv = reports
    assert kv.flops < klein.flops and kv.flops_stock < klein.flops_stock and kv.flops_ratio > 1
