"""A plan that is given the cells which were found counts what the report counts, to the digit."""

import numpy as np
import pytest
import torch

import specedit
from specedit.cost.flops import plan
from specedit.cost.tables import ModelCost
from specedit.method import sampler
from tests.models.planned import assert_as_planned, presets_and_restores

SIZE = 128, 128  # as the tiny Qwen pipeline takes its picture
THRESHOLD = dict(flux=1.6, qwen=1.15)  # of random weights: some of the cells
CORNER = np.zeros(SIZE, dtype=bool)
CORNER[:40, :30] = True
DOT = np.zeros(SIZE, dtype=bool)
DOT[-1, -1] = True
FEW = dict(steps=(3, 4, 3))  # where neither a preset nor a forecast needs its own


@pytest.fixture
def make_family(request, picture):
    """Makes (pipeline, arguments of a call) of a family."""
    made = {}

    def make(family):
        if family not in made:
            call = dict(height=SIZE[0], width=SIZE[1], output_type="latent", prompt="make it red", image=picture(*SIZE))
            if family == "flux":
                call |= dict(max_area=SIZE[0] * SIZE[1], _auto_resize=False, max_sequence_length=16)
            else:
                call |= dict(negative_prompt="blue and dark", true_cfg_scale=2.5)
            made[family] = request.getfixturevalue(dict(flux="make_pipe", qwen="make_qwen")[family])(), call
        return made[family]

    return make


@pytest.fixture
def compare(make_family, monkeypatch):
    """Runs a call, and compares its report with the plan for the cells that it found."""
    runs, edit = [], sampler.edit
    monkeypatch.setattr(sampler, "edit", lambda run, mask: runs.append(run) or edit(run, mask))

    def check(family, mask=None, call=None, **config):
        pipe, arguments = make_family(family)
        few = {} if config.keys() & {"config", "forecast"} else FEW
        specedit.install(pipe, **dict(threshold=THRESHOLD[family], dilation=0) | few | config)
        output = pipe(**arguments | (call or {}), edit_mask=mask, generator=torch.Generator().manual_seed(7))
        report, state = output.report, runs[-1].state
        texts = state.texts
        cost = ModelCost(
            pipe.transformer.config, texts[0], len(texts), scheduler=pipe.scheduler.config,
            negative_text_tokens=texts[-1],
        )  # fmt: skip
        cells = torch.ones(state.grid.coarse().shape, dtype=torch.bool)
        cells = cells if report.expand_mask is None else report.expand_mask
        size = [16 * side for side in state.grid.shape]
        planned = plan(report.config, cost, *size, cells=cells, drafts=mask is None)
        assert_as_planned(report, planned)
        assert report.flops_stock == pytest.approx(planned["flops_stock"] * report.stock_steps / 50, rel=1e-12)
        return report

    return check


@pytest.mark.slow
@pytest.mark.parametrize(("family", "first", "turn"), [("flux", "full", 0), ("qwen", "reference", 1)])
def test_presets(compare, family, first, turn):
    runs = [compare(family, config=preset, restore=restore) for preset, restore in presets_and_restores(first, turn)]
    assert any(0 < report.expand_fraction < 1 for report in runs)


OPTIONS = [
    dict(restore="reference"),
    dict(draft_steps=0, restore="reference"),
    dict(reference_keep=0.15, restore="reference"),
    dict(reference_keep=0.3, locked="reference", steps=(1, 3, 1), forecast="reuse", forecast_interval=2),
    dict(reference_keep=0.2, restore="pixels", guidance_range=(0.1, 0.8)),
    dict(restore="pixels"),
    dict(restore="pixels", steps=(5, 0, 1), forecast="reuse", forecast_interval=2),
    dict(restore="pixels", draft_steps=0, guidance_range=(0.1, 0.8)),
    dict(locked="reference", restore="reference"),
    dict(locked="reference", restore="full", attention="stock"),
    dict(locked="reference", restore="reference", reference_refresh=3, forecast="taylor", forecast_order=1),
    dict(locked="cached", restore="reference", steps=(2, 6, 7)),
    dict(locked="cached", restore="full", guidance_range=(0.6, 0.8)),
    dict(reference_refresh=2),
    dict(reference_refresh=2, restore="reference", steps=(3, 3, 2)),
    dict(forecast="taylor", forecast_order=1, forecast_interval=3),
    dict(forecast="reuse", reference_refresh=3),
    dict(forecast="freqca", steps=(0, 0, 9)),
    dict(guidance_range=(0.4, 0.8), uniform_stride=0),
    dict(attention="stock"),
    dict(verify_coarse=False, keep_pixels=True),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "config"),
    [("qwen" if "guidance_range" in config or i % 2 else "flux", config) for i, config in enumerate(OPTIONS)],
    ids=str,
)
def test_options(compare, family, config):
    """The families take turns; only Qwen's calls are guided."""
    compare(family, CORNER, **config)
    if config.keys() & {"restore", "reference_refresh"}:
        compare(family, **config)


@pytest.mark.slow
@pytest.mark.parametrize("forecast", ["toca", "duca"])
def test_token_wise_forecasts(compare, forecast):
    compare("flux", CORNER, forecast=forecast, forecast_interval=4)
    compare("flux", forecast=forecast, forecast_interval=4)
    compare("flux", CORNER, forecast=forecast, forecast_interval=4, locked="reference")


@pytest.mark.parametrize(
    "more", [{}, dict(locked="reference"), dict(locked="cached"), dict(reference_keep=0.2)], ids=str
)
@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_a_batch_whose_samples_have_masks_of_their_own(compare, family, more):
    masks = [CORNER, DOT]
    report = compare(family, masks, dict(num_images_per_prompt=2), restore="reference", uniform_stride=0, **more)
    assert report.expand_mask.flatten(1).sum(1).unique().numel() == 2


def test_an_unchanged_layout_goes_on_where_it_was(compare):
    """Everything edited: the full stage begins where the mixed one ended, within another part of the range."""
    compare("qwen", np.ones(SIZE), guidance_range=(0.5, 0.6), steps=(2, 3, 4))
