"""LESA (arXiv 2602.20497): a learned predictor of feature change, with an expert for every stage of noise."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..forecast_options import ForecastContext, SeriesOptions, register_forecast
from .base import Differences, Forecaster
from .taylor import taylor_coefficients

WEIGHTS = Path(__file__).parent / "weights"
LONGEST = 10.0  # steps ahead that the inputs are scaled by
TRAIN = "train one with: python -m training.lesa --out FILE, in the repository"


class KANLayer(nn.Module):
    """A Kolmogorov-Arnold layer (arXiv 2404.19756): y_o = sum_i a_oi silu(x_i) + sum_ig c_oig B_g(x_i).

    B_g are cubic B-splines on a uniform grid over [-1, 1]; inputs beyond it are clamped. (n, inputs) to (n, outputs).
    """

    def __init__(self, inputs: int, outputs: int, intervals: int = 6):
        super().__init__()
        step = 2 / intervals
        self.register_buffer("knots", torch.arange(-3, intervals + 4) * step - 1)
        self.base = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))
        self.spline = nn.Parameter(0.1 * torch.randn(outputs, inputs, intervals + 3))

    def splines(self, x: Tensor) -> Tensor:
        """(n, inputs, intervals + 3) B-spline values, by Cox and de Boor; they sum to one."""
        x = x.clamp(-1, 1 - 1e-6)[..., None]
        t = self.knots
        values = ((x >= t[:-1]) & (x < t[1:])).to(x.dtype)
        for k in range(1, 4):
            left = (x - t[: -k - 1]) / (t[k:-1] - t[: -k - 1]) * values[..., :-1]
            right = (t[k + 1 :] - x) / (t[k + 1 :] - t[1:-k]) * values[..., 1:]
            values = left + right
        return values

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x) @ self.base.T + torch.einsum("nig,oig->no", self.splines(x), self.spline)


class Predictor(nn.Module):
    """Stage experts: coefficients of the stacked differences for a gap of x steps, from noise level `start` to `sigma`.

    F(x) = F(0) + alpha * z,  z = sum_{i=1..m} x^i/i! * (1 + KAN_e(x, sigma, start - sigma)_i) * D_i

    with one KAN (3 inputs, `width`, `order` outputs) and one alpha for each of `experts` equal intervals e of sigma.
    The last layer starts at zero and alpha at one: untrained, it is TaylorSeer. Published: h_t + alpha * z with a KAN
    over the gap, stage experts and training in two stages; no code is public, and what z is made of is not settled by
    the text. Learning the coefficients of the differences, not the features, keeps it about a thousand numbers, leaves
    resolution, batch and channels open, and makes a forecast one pass over the cache.
    """

    def __init__(self, order: int = 2, experts: int = 3, width: int = 8):
        super().__init__()
        self.order, self.experts, self.width = order, experts, width
        self.layers = nn.ModuleList(nn.ModuleList([KANLayer(3, width), KANLayer(width, order)]) for _ in range(experts))
        self.alpha = nn.Parameter(torch.ones(experts))
        for _, last in self.layers:
            nn.init.zeros_(last.base)
            nn.init.zeros_(last.spline)

    def expert(self, sigma: float) -> int:
        """Which expert answers for `sigma` in [0, 1]; the first one has the highest noise."""
        return min(self.experts - 1, max(0, int((1 - sigma) * self.experts)))

    def forward(self, x: float, sigma: float, start: float) -> Tensor:
        """(order + 1,) float32 coefficients of D_0..D_order."""
        e = self.expert(sigma)
        first, last = self.layers[e]
        inputs = torch.tensor([[2 * x / LONGEST - 1, 2 * sigma - 1, 4 * (start - sigma) - 1]], device=self.alpha.device)
        gain = last(torch.tanh(first(inputs)))[0]
        series = torch.tensor(taylor_coefficients(x, self.order + 1)[1:], device=self.alpha.device)
        return torch.cat([torch.ones_like(series[:1]), self.alpha[e] * series * (1 + gain)])


def check_order(predictor: Predictor, order: int) -> None:
    if order != predictor.order:
        raise ValueError(f"forecast_order: expected {predictor.order}, as the weights were trained, got {order}")


class LesaForecaster(Forecaster):
    """TaylorSeer's differences with the coefficients of a trained `Predictor`."""

    def __init__(self, interval: int, *, predictor: Predictor, order: int = 2, **more):
        check_order(predictor, order)
        self.predictor, self.order, self.history = predictor, order, order + 1
        super().__init__(interval, **more)

    def reset(self) -> None:
        super().reset()
        self.differences = Differences(self.order)
        self.start: float | None = None  # noise level of the last full step

    def tensors(self) -> list[Tensor]:
        return [] if self.differences.stack is None else [self.differences.stack]

    def _observe(self, step, feature, sigma) -> None:
        self.differences.observe(step, feature)
        self.start = sigma

    def _predict(self, step, sigma) -> Tensor:
        with torch.no_grad():  # the predictor stays on the CPU: its answer is a handful of floats
            coefficients = self.predictor(float(step - self.last), sigma, self.start).tolist()
        return self.differences.evaluate(coefficients, self.backend)


def signature(model_config: Any) -> dict[str, int]:
    """What tells one transformer from another, for weights that belong to one."""
    names = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "in_channels")
    return {name: int(model_config[name]) for name in names if model_config.get(name) is not None}


def save(predictor: Predictor, path: str | PathLike[str], model_config: Any) -> None:
    """Write weights and what they fit as one safetensors file."""
    shape = dict(order=predictor.order, experts=predictor.experts, width=predictor.width)
    metadata = {"shape": json.dumps(shape), "model": json.dumps(signature(model_config))}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in predictor.state_dict().items()}, path, metadata)


def packaged(model_config: Any) -> Path | None:
    """The weights in the package that were trained for such a model, None without any."""
    wanted = signature(model_config)
    return next((f for f in sorted(WEIGHTS.glob("lesa-*.safetensors")) if _model(str(f)) == wanted), None)


def load(path: str | PathLike[str] | None, model_config: Any) -> Predictor:
    """The predictor of `path`, or the packaged one that fits the model.

    Raises:
        FileNotFoundError: no such file, or no packaged weights for this model; it says how to train them.
        ValueError: not such a file, or weights of another model.
    """
    if path is None:
        if (file := packaged(model_config)) is None:
            raise FileNotFoundError(f"forecast='lesa': no trained predictor for this transformer; {TRAIN}")
        return _read(str(file))
    if not Path(path).exists():
        raise FileNotFoundError(f"forecast_weights: expected a file, got {str(path)!r}, which does not exist; {TRAIN}")
    if (got := _model(str(path))) != (wanted := signature(model_config)):
        raise ValueError(f"forecast_weights: expected a predictor trained for {wanted}, got one for {got}; {TRAIN}")
    return _read(str(path))


def _metadata(path: str) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return {name: json.loads(metadata[name]) for name in ("shape", "model")}
    except Exception as error:  # safetensors raises its own class on foreign files
        raise ValueError(f"forecast_weights: expected a file that training.lesa wrote, got {path}: {error}") from error


def _model(path: str) -> dict[str, int]:
    return _metadata(path)["model"]


def _read(path: str) -> Predictor:
    predictor = Predictor(**_metadata(path)["shape"])
    with safe_open(path, "pt") as file:
        predictor.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return predictor.eval().requires_grad_(False)


@register_forecast
@dataclass(frozen=True)
class Lesa(SeriesOptions):
    """LESA.

    Args:
        weights: file of `python -m training.lesa`; None takes the packaged weights that fit the transformer.
    """

    weights: str | None = None

    name = "lesa"

    def validate(self) -> None:
        if self.weights is None:
            return
        if not isinstance(self.weights, (str, os.PathLike)):
            raise TypeError(f"weights: expected a file name or None, got {self.weights!r}")
        self.set("weights", os.fspath(self.weights))

    def prepare(self, pipe: Any) -> Predictor:
        predictor = load(self.weights, pipe.transformer.config)
        check_order(predictor, self.order)
        return predictor

    def make(self, context: ForecastContext) -> Forecaster:
        return LesaForecaster(
            self.interval, predictor=context.shared, order=self.order, warmup=context.warmup, backend=context.backend
        )
