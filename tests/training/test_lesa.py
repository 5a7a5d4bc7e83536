"""Training LESA's predictor: both stages lower what they train on, and the file is one that the sampler takes."""

import argparse
import json

import pytest
import torch

import specedit
from specedit.forecast import lesa
from specedit.forecast.base import Differences, full_steps
from training import lesa as lesa_training


def call_of(picture, seed):
    return dict(
        image=picture(64, 64, seed), prompt="make it red", height=64, width=64, max_area=64 * 64, _auto_resize=False,
        max_sequence_length=16, generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


@pytest.fixture
def trajectory(pipe, picture):
    return lesa_training.record(pipe, 9, **call_of(picture, 0))


def test_recorded_trajectory_is_the_stock_run(pipe, picture, trajectory):
    call = call_of(picture, 0)
    stock = pipe(**call, num_inference_steps=9, output_type="latent").images
    torch.testing.assert_close(trajectory.tokens[-1], stock, rtol=1e-5, atol=1e-5)
    assert len(trajectory.tokens) == 10 and len(trajectory.outputs) == 9


def test_layout_is_cached_once(trajectory):
    assert len(trajectory.group.inputs) == 1
    lesa_training.rollout(lesa.Predictor(), trajectory, 3)
    assert len(trajectory.group.inputs) == 1


def test_samples_hold_the_squared_error_of_every_forecast(trajectory):
    data = list(lesa_training.samples(trajectory, 3, 2))
    full = full_steps(9, 3, 3)
    assert len(data) == full.count(False) == 4
    differences = Differences(2)
    for step in range(3):
        differences.observe(step, trajectory.outputs[step][0])
    coefficients = torch.tensor([0.9, 1.5, -0.3])
    forecast = torch.einsum("k,k...->...", coefficients, differences.stack)
    truth = trajectory.outputs[4][0]  # the second cached step
    error = (forecast - truth).square().sum() / truth.square().sum()
    assert data[1].loss(coefficients).item() == pytest.approx(error.item(), rel=1e-3)
    assert data[1].inputs == (2.0, trajectory.sigmas[4], trajectory.sigmas[2])


def test_duplicates_are_averaged(trajectory):
    data = list(lesa_training.samples(trajectory, 3, 2))
    other = [lesa_training.Sample(*s.inputs, 3 * s.gram, 2 * s.product) for s in data]
    coefficients = torch.tensor([0.9, 1.5, -0.3])
    pairs = lesa_training.average_duplicates([*data, *other])
    assert len(pairs) == len(data)
    for both, a, b in zip(pairs, data, other, strict=True):
        mean = (a.loss(coefficients) + b.loss(coefficients)) / 2
        torch.testing.assert_close(both.loss(coefficients), mean)


@pytest.mark.thorough
def test_ground_truth_learns(trajectory):
    torch.manual_seed(0)
    data = list(lesa_training.samples(trajectory, 3, 2))
    losses = lesa_training.ground_truth(lesa.Predictor(), data, 40, 1e-2, 0)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.thorough
def test_closed_loop_learns(trajectory):
    torch.manual_seed(0)
    predictor = lesa.Predictor()
    losses = lesa_training.closed_loop(predictor, [trajectory], [3], 12, 1e-2)
    assert losses[-1] < 0.9 * losses[0]


def test_exact_forecasts_have_no_loss(trajectory):
    """Where outputs never change, every coefficient but the first is idle and the forecast is exact."""
    constant = [torch.ones_like(trajectory.outputs[0][0])]
    trajectory.outputs = [constant] * 9
    trajectory.branches = lambda tokens, step: constant
    for step in range(9):
        width = trajectory.sigmas[step + 1] - trajectory.sigmas[step]
        trajectory.tokens[step + 1] = trajectory.tokens[step] + width * constant[0]
    losses = lesa_training.rollout(lesa.Predictor(), trajectory, 3)
    assert len(losses) == 2 and max(loss.item() for loss in losses) < 1e-8


def test_written_file_is_used_by_the_model(pipe, picture, edit, tmp_path):
    options = argparse.Namespace(
        out=tmp_path / "w.safetensors", steps=[9, 8], intervals=[3], order=2, experts=2, width=4, epochs=2,
        closed_epochs=1, rate=1e-2, seed=0,
    )  # fmt: skip
    losses = lesa_training.train(pipe, [call_of(picture, seed) for seed in (0, 1)], options)
    assert len(losses["ground_truth"]) == 3 and len(losses["closed_loop"]) == 1
    specedit.install(pipe, steps=(0, 0, 9), forecast="lesa", forecast_interval=3, forecast_weights=options.out)
    assert edit(pipe).isfinite().all() and specedit.report(pipe).cached_steps == 4


def test_pairs_are_read_from_a_file(tmp_path, picture):
    picture(64, 64).save(tmp_path / "a.png")
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"image": "a.png", "prompt": "make it red"}) + "\n")
    (call,) = lesa_training.file_calls(file, 5)
    assert call["prompt"] == "make it red" and call["image"].size == (64, 64)
    file.write_text('{"image": "none.png", "prompt": "x"}\n')
    with pytest.raises(ValueError, match="line 1: expected"):
        list(lesa_training.file_calls(file, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "w", "--model", "dir"], "--pairs: expected a file"),
        (["--out", "w", "--steps", "1"], "--steps: expected integers of at least 2"),
        (["--out", "w", "--intervals", "1", "4"], "--intervals: expected integers of at least 2"),
        ([], "--out"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        lesa_training.parse(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
