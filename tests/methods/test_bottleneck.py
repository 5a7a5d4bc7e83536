"""Bottleneck Sampling: its schedule, the noise at its switches, and what its settings cost."""

import pytest
import torch

import specedit
from specedit import flops
from specedit.geometry import PACKED, UNPACKED
from specedit.layout import mean_pixels
from specedit.method.schedule import shift_factor
from specedit.methods import Bottleneck
from tests.methods import oracle

FLUX = dict(num_layers=19, num_single_layers=38, num_attention_heads=24, attention_head_dim=128)


@pytest.mark.parametrize(("setting", "listed", "reported"), [("5x", (4, 12, 5), 571.23), ("7x", (3, 8, 4), 431.52)])
def test_settings_cost_what_ralus_table_reports(setting, listed, reported):
    """Its table counts 610.02 T for 10 steps of FLUX.1 and 431.45 T for 7, and a step in proportion to its tokens."""
    method = Bottleneck.at(setting)
    step = (610.02 - 431.45) / 3
    rest, share = 610.02 - 10 * step, (512 + 1024) / (512 + 4096)
    first, low, last = method.steps
    assert rest + step * (first + low * share + last) == pytest.approx(reported, rel=0.002)
    assert (first, *method.restarts) == (listed[0], low / listed[1], last / listed[2])


def test_3x_costs_what_specedits_table_reports():
    method = Bottleneck.at("3x")
    full, low = (flops.transformer_flops(FLUX, 512 + 2 * tokens) / 1e12 for tokens in (4096, 1024))
    assert method.nfe == 30
    assert full * (method.steps[0] + method.steps[2]) + low * method.steps[1] == pytest.approx(2727.1, rel=0.03)


def test_every_stage_has_the_shift_of_its_own_tokens():
    run = oracle.make_run(Bottleneck((2, 3, 2), (0.8, 0.4)), (32, 32), samples=1)
    oracle.edit(run)
    scheduler, calls = oracle.PIPE.scheduler, run.adapter.seen
    sigmas = [sigma for *_, sigma in calls]

    def shifted(time, tokens):
        a = shift_factor(scheduler, tokens)
        return a * time / (1 + (a - 1) * time)

    high, low = [shifted(t, 1024) for t in (1, 1 / 2)], [shifted(0.8 * t, 256) for t in (1, 2 / 3, 1 / 3)]
    last = [shifted(0.4 * t, 1024) for t in (1, 1 / 2)]
    assert sigmas == pytest.approx([*high, *low, *last], rel=1e-4)
    assert [layout.is_coarse for layout, *_ in calls] == [False, False, True, True, True, False, False]


@pytest.mark.parametrize("geometry", [PACKED, UNPACKED], ids=["packed", "unpacked"])
@pytest.mark.parametrize("shape", [(32, 32), (31, 33)], ids=str)
def test_noise_is_put_back_around_the_resized_result(geometry, shape):
    """x - (1 - s) x0 is fresh white noise of level s, of a picture that both ways of resizing leave as it is."""
    flat = torch.full((1, shape[0] * shape[1], oracle.CHANNELS), 2.0)
    run = oracle.make_run(Bottleneck((1, 1, 1)), shape, geometry, flat, samples=1)
    oracle.edit(run)
    noises = [(tokens - (1 - sigma) * 2) / sigma for _, tokens, sigma in run.adapter.seen]
    for noise in noises:
        assert float(noise.mean()) == pytest.approx(0, abs=5 / noise.numel() ** 0.5)
        assert float(noise.var()) == pytest.approx(1, abs=5 * (2 / noise.numel()) ** 0.5)
    assert abs(float((noises[0] * noises[2]).mean())) < 5 / noises[0].numel() ** 0.5
    small = mean_pixels(noises[0], run.state.grid) * 2
    assert abs(float((small * noises[1]).mean())) < 5 / small.numel() ** 0.5


def test_the_report_counts_every_stage_once(pipe, edit):
    specedit.install(pipe, method=Bottleneck((2, 3, 2)))
    edit(pipe)
    report = specedit.report(pipe)
    stages = {stage.name: stage for stage in report.stages if stage.steps}
    assert {name: stage.steps for name, stage in stages.items()} == {"full": 2, "coarse": 3, "final": 2}
    assert stages["full"].flops == stages["final"].flops > 2 * stages["coarse"].flops
    assert stages["coarse"].sigma_end == stages["full"].sigma_end == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(steps=(4, 10)), ValueError, r"^steps: expected three integers of at least 1, .* got 2 values"),
        (dict(steps=(4, 0, 2)), ValueError, r"^steps: expected three integers of at least 1, .* got 0"),
        (dict(restarts=(0.8, 1)), ValueError, r"^restarts: expected two numbers above 0 and below 1, got \(0.8, 1\)"),
        (dict(restarts=0.5), TypeError, r"^restarts: expected two numbers above 0 and below 1, got 0.5"),
        (dict(restarts=(0.5, "x")), TypeError, r"^restarts: expected two numbers"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        Bottleneck(**options)
