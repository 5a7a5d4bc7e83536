"""SPEED, spectral progressive diffusion: half resolution until the latents' power spectrum calls for the full one.

Xiao et al., "Spectral Progressive Diffusion for Efficient Image and Video Generation", arXiv 2605.18736. Its public
code (github.com/howardhx/speed, MIT) and its part of SGLang (pull request 27524) were read for constants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import integer, number
from ..layout import MixedLayout, TokenGrid
from ..method.adapter import LayoutGroup, Run
from ..method.groups import group_at
from ..method.sampler import Outcome
from ..method_options import Method, register_method
from ..method_plan import MethodRun, PlannedStage, all_steps
from . import resolution
from .shared import outcome_of, run_stage


@register_method
@dataclass(frozen=True)
class Speed(Method):
    """Two stages, all tokens coarse and all tokens fine, on the full picture's schedule.

    The switch comes at the first step whose noise is at most `switch_sigma`: there the highest frequency of the coarse
    grid begins to carry signal. The expansion is spectral; see `expand`. The power-law fit of FLUX.1-dev's latents is
    from configs.yaml of the authors' code; progressive_resolution/qwen_image.py in SGLang takes the same numbers for
    Qwen-Image. `power_law` fits those of another model. The setting "1.3x" is the default tolerance of both, "1.6x" the
    one that SGLang recommends for FLUX.1.

    There is one halving, as by default in both. The noise of the expansion is what the coarse stage left of the call's
    own noise (both draw it anew, which has the same distribution). Beyond an odd side the noise is drawn, and what is
    made there is cut off; the code rounds the coarse grid down. At least one step is at full resolution. The reference
    has the target's layout.

    Args:
        count: model evaluations, at least 1.
        delta: tolerance in (0, 1): the share of the error that noise may hide. A larger one switches later.
        amplitude, decay: A and beta of the power spectrum A * w^-beta, w in cycles per picture, of white noise 1.
    """

    count: int = 50
    delta: float = 0.01
    amplitude: float = 203.615097
    decay: float = 1.915461

    name = "speed"
    published: ClassVar = {"1.3x": {}, "1.6x": {"delta": 0.05}}

    def validate(self) -> None:
        self.set("count", integer("count", self.count, 1))
        for name, expected, high in (
            ("delta", "a number above 0 and below 1", 1.0),
            ("amplitude", "a number above 0", math.inf),
            ("decay", "a number above 0", math.inf),
        ):
            value = number(name, getattr(self, name), expected)
            if not 0 < value < high:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
            self.set(name, value)

    @property
    def nfe(self) -> int:
        return self.count

    def with_steps(self, n: int) -> Speed:
        return replace(self, count=n)

    def switch_sigma(self, height: int, width: int) -> float:
        """The noise level of the switch, for an output of so many latent pixels (eq. 9 and 10).

        1 / (1 + sqrt(delta / (P (1 + P - delta)))), P the power at the coarse grid's highest frequency.
        """
        power = self.amplitude * (0.5 * min(height, width) / 2) ** -self.decay
        if not power:  # less than a float can hold
            return 0.0
        return 1 / (1 + math.sqrt(self.delta / (power * (1 + power - self.delta))))

    def switch_step(self, sigmas: list[float], height: int, width: int) -> int:
        """The index of the first step at full resolution, of a schedule of `count` + 1 noise levels."""
        limit = self.switch_sigma(height, width)
        found = next((i for i, sigma in enumerate(sigmas) if sigma <= limit), self.count)
        return min(found, self.count - 1)

    def planned_stages(self, run: MethodRun) -> list[PlannedStage]:
        sigmas, grid = run.sigmas(run.grid.tokens, self.count), run.grid
        switch = self.switch_step(sigmas, *(grid.geometry.patch * side for side in grid.shape))
        stages = [all_steps("coarse", "coarse", switch), all_steps("full", "fine", self.count - switch)]
        return [stage for stage in stages if stage.steps]

    def edit(self, run: Run, edit_mask: Any = None) -> Outcome:
        state, grid = run.state, run.state.grid
        resolution.check_size(self, state)
        rows, device = list(range(state.batch)), state.device
        fine, coarse = (make(grid, device) for make in (MixedLayout.all_fine, MixedLayout.all_coarse))
        sigmas: list[float] = run.adapter.sigmas(run.pipe, grid.tokens, 1.0, 0.0, self.count).tolist()
        switch = self.switch_step(sigmas, *(grid.geometry.patch * side for side in grid.shape))
        groups: list[LayoutGroup] = []
        spectrum = None
        if switch:
            spectrum = dct(padded_noise(run))
            groups = [group_at(run, rows, coarse, coarse_noise(spectrum, grid), sigmas[: switch + 1])]
            run_stage(run, "coarse", groups)
        if not (groups and run.trace.interrupted):
            tokens = state.noise
            if spectrum is not None:
                tokens, sigmas[switch] = expand(groups[0].tokens, sigmas[switch], spectrum, grid)
            groups = [group_at(run, rows, fine, tokens, sigmas[switch:])]
            run_stage(run, "full", groups)
        return outcome_of(run, groups, edit_mask)


def dct_matrix(n: int, like: Tensor) -> Tensor:
    """(n, n) orthonormal DCT-II, of the dtype and on the device of `like`: row k has k/2 cycles over the picture."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = (math.pi * (2 * i + 1) * k / (2 * n)).cos() * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.to(like)


def dct(image: Tensor) -> Tensor:
    """The spectrum of (..., H, W), of the same shape."""
    rows, columns = (dct_matrix(n, image) for n in image.shape[-2:])
    return rows @ image @ columns.T


def inverse_dct(spectrum: Tensor) -> Tensor:
    rows, columns = (dct_matrix(n, spectrum) for n in spectrum.shape[-2:])
    return rows.T @ spectrum @ columns


def padded_noise(run: Run) -> Tensor:
    """The call's noise as an image (B, channels, H, W) that has twice the coarse grid's sides, the rest drawn."""
    state, grid = run.state, run.state.grid
    image, cells = grid.geometry.to_image(state.noise, grid.shape), grid.coarse()
    whole = cells.extended(cells.height, cells.width)
    if whole == grid:
        return image
    padded = grid.geometry.to_image(state.draw(whole.tokens), whole.shape)
    padded[..., : image.shape[-2], : image.shape[-1]] = image
    return padded


def coarse_noise(spectrum: Tensor, grid: TokenGrid) -> Tensor:
    """White noise (B, cells, C) of a grid's coarse tokens: the low frequencies of that of the whole picture."""
    height, width = (n // 2 for n in spectrum.shape[-2:])
    return grid.geometry.from_image(inverse_dct(spectrum[..., :height, :width]))


def expand(tokens: Tensor, sigma: float, spectrum: Tensor, grid: TokenGrid) -> tuple[Tensor, float]:
    """Spectral noise expansion (eq. 5 and 6): keep the coarse picture's coefficients, and fill up with noise.

    The inverse transform of twice the sides halves the signal. Times kappa = 2 / (1 + s) it is (1 - s') x0, and the
    noise is white of level s' = kappa s.

    Args:
        tokens: (B, cells, C), all coarse, at noise level s = `sigma`.
        spectrum: (B, channels, 2H, 2W) of white noise, whose high frequencies are taken.

    Returns:
        (B, grid.tokens, C), all fine, and its noise level s'.
    """
    coarse = grid.geometry.to_image(tokens, grid.coarse().shape)
    filled = sigma * spectrum
    filled[..., : coarse.shape[-2], : coarse.shape[-1]] = dct(coarse)
    kappa = 2 / (1 + sigma)
    height, width = (grid.geometry.patch * side for side in grid.shape)
    image = kappa * inverse_dct(filled)[..., :height, :width]
    return grid.geometry.from_image(image), kappa * sigma


def power_law(latents: Tensor) -> tuple[float, float]:
    """A and beta of latents (B, channels, H, W) as the model takes them: a line through the logarithms of their power.

    The power of frequency w is the mean square of the DCT coefficients of w - 1/2 to w + 1/2 cycles per picture, for w
    from 1 to half the shorter side.
    """
    height, width = latents.shape[-2:]
    power = dct(latents.double()).square().flatten(0, -3).mean(0).cpu()
    rows, columns = (torch.arange(n, dtype=torch.float64) / 2 for n in (height, width))
    bins = (rows[:, None].square() + columns.square()).sqrt().round().long()
    sums, counts = (
        torch.zeros(int(bins.max()) + 1, dtype=torch.float64).index_add_(0, bins.flatten(), values.flatten())
        for values in (power, torch.ones_like(power))
    )
    w = torch.arange(1, min(height, width) // 2 + 1)
    x, y = w.double().log(), (sums[w] / counts[w]).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    return math.exp(float(y.mean() - slope * x.mean())), -slope
