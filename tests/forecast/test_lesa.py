"""LESA: the KAN, the experts, the file, and what an untrained predictor is."""

import json
from pathlib import Path

import pytest
import torch

from specedit.forecast import lesa
from specedit.forecast.taylor import TaylorForecaster, taylor_coefficients

MODEL = dict(num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16, in_channels=16)


def test_splines_sum_to_one_and_are_cubic():
    layer = lesa.KANLayer(1, 1)
    x = torch.linspace(-1, 0.999, 50)[:, None]
    splines = layer.splines(x)
    torch.testing.assert_close(splines.sum(-1), torch.ones(50, 1))
    assert (splines >= -1e-6).all() and ((splines > 1e-6).sum(-1) <= 4).all()
    # spline spaces hold cubics: a least-squares fit of x^3 leaves nothing
    target = x**3
    fit = torch.linalg.lstsq(splines[:, 0].double(), target.double()).solution
    assert (splines[:, 0].double() @ fit - target).abs().max() < 1e-5


def test_inputs_beyond_the_grid_are_clamped():
    layer = lesa.KANLayer(1, 1)
    torch.testing.assert_close(layer.splines(torch.tensor([[5.0]])), layer.splines(torch.tensor([[1.0]])))


def test_experts_by_noise():
    predictor = lesa.Predictor(experts=3)
    assert [predictor.expert(s) for s in (1.0, 0.7, 0.5, 0.34, 0.3, 0.0)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_untrained_it_is_taylorseer(tokens, order):
    predictor = lesa.Predictor(order=order)
    torch.testing.assert_close(predictor(3.0, 0.5, 0.6), torch.tensor(taylor_coefficients(3.0, order + 1)))
    pair = lesa.LesaForecaster(4, predictor=predictor, order=order), TaylorForecaster(4, order=order)
    for forecaster in pair:
        for step in range(order + 1):
            forecaster.observe(step, tokens * step**2, 0.9 - 0.1 * step)
    torch.testing.assert_close(pair[0].predict(order + 2, 0.3), pair[1].predict(order + 2))


def test_experts_answer_for_themselves():
    predictor = lesa.Predictor(order=1, experts=2)
    with torch.no_grad():
        predictor.alpha[1] = 3.0
    assert predictor(2.0, 0.9, 0.95).tolist() == [1.0, 2.0] and predictor(2.0, 0.1, 0.2).tolist() == [1.0, 6.0]


def test_save_and_load(tmp_path):
    predictor = lesa.Predictor(order=1, experts=2, width=3)
    with torch.no_grad():
        predictor.layers[0][1].base.fill_(0.3)
    lesa.save(predictor, tmp_path / "a" / "w.safetensors", MODEL)
    loaded = lesa.load(tmp_path / "a" / "w.safetensors", MODEL)
    assert torch.equal(loaded(2.0, 0.9, 1.0), predictor(2.0, 0.9, 1.0)) and (loaded.order, loaded.experts) == (1, 2)


def test_the_embedded_editors_weights_come_with_the_package():
    folder = Path(lesa.__file__).parents[1] / "micro" / "weights" / "kontext" / "transformer"
    config = json.loads((folder / "config.json").read_text())
    predictor = lesa.load(None, config)
    assert lesa.packaged(config).parent == lesa.WEIGHTS and lesa.packaged(MODEL) is None
    assert predictor.order == 2
    for sigma in (0.9, 0.5, 0.1):
        weights = predictor(3.0, sigma, sigma + 0.06)
        assert weights.isfinite().all() and weights[0] == 1
        assert (weights - torch.tensor(taylor_coefficients(3.0, 3))).abs().max() > 1e-2  # trained


def test_weights_that_do_not_fit(tmp_path):
    lesa.save(lesa.Predictor(), tmp_path / "w.safetensors", MODEL)
    with pytest.raises(ValueError, match=r"expected a predictor trained for .*'num_layers': 2"):
        lesa.load(tmp_path / "w.safetensors", MODEL | {"num_layers": 2})
    with pytest.raises(FileNotFoundError, match=r"expected a file, got .*training.lesa"):
        lesa.load(tmp_path / "none", MODEL)
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(ValueError, match=r"expected a file that training\.lesa wrote"):
        lesa.load(tmp_path / "text", MODEL)
    with pytest.raises(FileNotFoundError, match=r"no trained predictor for this transformer.*training.lesa"):
        lesa.load(None, MODEL)
    with pytest.raises(ValueError, match="forecast_order: expected 2, as the weights were trained, got 3"):
        lesa.LesaForecaster(4, predictor=lesa.Predictor(), order=3)
