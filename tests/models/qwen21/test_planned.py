"""A plan for the cells that were found counts what the report counts, to the digit, in every preset and restore."""

import itertools

import numpy as np
import pytest
import torch

import specedit
from specedit.config import presets
from specedit.cost.flops import plan
from specedit.cost.tables import ModelCost
from specedit.methods import RegionE, SpotEdit
from specedit.models import qwen21

if qwen21.QwenImage21 is None:
    pytest.skip("this diffusers has no Qwen-Image-2.1", allow_module_level=True)

from tests.models.planned import assert_as_planned

CORNER = np.zeros((128, 128), dtype=bool)
CORNER[:40, :30] = True
GUIDED = dict(negative_prompt="a longer one", true_cfg_scale=2.5)


@pytest.fixture
def compare(family):
    """Runs a call, and compares its report with the plan for the cells that it found."""
    pipe = family.make()
    _, state = family.prepare(family.make(), **GUIDED)

    def check(mask=CORNER, call=None, **config):
        specedit.install(pipe, **dict(threshold=0.9, dilation=0) | config)
        report = pipe(**family.call(128, 128) | dict(output_type="latent", edit_mask=mask) | (call or {})).report
        cost = ModelCost(
            pipe.transformer.config, state.text_tokens, 2 if call else 1, scheduler=pipe.scheduler.config,
            negative_text_tokens=state.negative_text_tokens, fixed_prefix=True, latent_pixels=1,
            adapter=family.adapter.name,
        )  # fmt: skip
        cells = report.expand_mask
        assert_as_planned(report, plan(report.config, cost, 128, 128, cells=cells, drafts=mask is None))
        assert report.flops_stock == pytest.approx(
            cost.stock(2 * 64, report.stock_steps, len(report.edit_mask)), rel=1e-12
        )
        return report

    return check


@pytest.mark.slow
def test_presets(compare):
    restores = itertools.cycle(("full", "reference", "pixels"))
    for preset, config in presets.items():
        restore = next(restores)
        if restore == "pixels" and config.locked != "coarse":  # which exclude each other
            restore = next(restores)
        compare(config=preset, restore=restore)
    for restore in ("full", "reference", "pixels"):
        compare(None, config="turbo", restore=restore)


@pytest.mark.parametrize(
    "config",
    [
        dict(forecast="taylor", forecast_order=1, forecast_interval=3, steps=(0, 0, 6)),
        dict(attention="stock", steps=(1, 2, 1)),
        dict(locked="reference", steps=(1, 2, 1)),
        dict(locked="cached", steps=(1, 3, 1)),
        dict(locked="cached", restore="reference", steps=(1, 6, 7), uniform_stride=0),
        dict(forecast="toca", forecast_interval=3, steps=(3, 3, 4)),
        dict(forecast="duca", forecast_interval=3, steps=(3, 3, 4), locked="reference"),
        dict(keep_pixels=True, steps=(1, 1, 1)),
    ],
    ids=str,
)
def test_options(compare, config):
    compare(**config)


@pytest.mark.slow
def test_guidance_and_its_range(compare):
    for bounds in (None, (0.4, 0.8), (0.0, 0.6)):
        compare(call=GUIDED, guidance_range=bounds, steps=(2, 2, 2))
    compare(None, GUIDED, steps=(1, 1, 1), draft_steps=2)


@pytest.mark.parametrize("locked", ["coarse", "cached"])
def test_a_guided_batch(compare, locked):
    """Samples of several layouts share the prefix that their first group computes."""
    masks = torch.zeros(2, 8, 8)
    masks[0, :3, :3] = masks[1, 2:, 2:] = 1
    call = dict(GUIDED, prompt=["make it red"] * 2, negative_prompt=["a longer one"] * 2)
    compare(masks, call, steps=(1, 3, 1), locked=locked)


@pytest.mark.parametrize("method", [SpotEdit(count=9), RegionE(count=9)], ids=lambda method: method.name)
def test_methods_that_skip_tokens(compare, method):
    for call in (None, GUIDED):
        compare(CORNER, call, method=method, threshold=None, dilation=1)
