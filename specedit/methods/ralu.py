"""RALU: low resolution, then the picture's edges early at full resolution, then everything.

Jeong et al., "Upsample What Matters: Region-Adaptive Latent Sampling for Accelerated Diffusion Transformers", arXiv
2507.08422. Its public code (github.com/ignoww/RALU, which has no licence) was read for constants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import number, sequence, share
from ..layout import MixedLayout, TokenGrid
from ..method.adapter import LayoutGroup, Run
from ..method.expand import coarsen_noise
from ..method.groups import group_at, split_layouts, start_tokens
from ..method.sampler import Outcome
from ..method.schedule import shifted_sigmas
from ..method.selectors import to_tokens
from ..method_options import Method, register_method
from ..method_plan import MethodRun, PlannedStage
from . import resolution
from .shared import outcome_of, run_stage


@register_method
@dataclass(frozen=True)
class Ralu(Method):
    """Three stages: all tokens coarse, the cells with most edges split, all tokens fine.

    From `set_params` of the code's pipeline_flux_RALU.py: the defaults (its level 4) and the setting "7x" (level 7).
    The setting "5x" is from table S1 of the paper's CVPR 2026 version, which names c in place of z and has a share of
    0.2. `shifts` and `z` minimise the Jensen-Shannon divergence that the code's RALU_NTDM.py defines, for a model of
    shift 3; steps enter it by their proportions alone, so scaled steps keep them.

    Followed is the paper: latent pixels are repeated (the code repeats packed tokens), tokens that keep their
    resolution are renoised by I - cI (the code adds noise of full variance), and edges are those of the whole range of
    the picture (the code clips a decoder's output in -1..1 to 0..1). The mixed stage keeps the coarse grid's positions,
    as in the code. The reference has the target's layout.

    Args:
        steps: model evaluations of the coarse, mixed and full stage.
        ends: t = 1 - sigma, at which the coarse and the mixed stage end.
        shifts: h of each stage's schedule sigma = h*u / (1 + (h-1)*u), u uniform.
        z: 1/sqrt(c), at least 2, of the noise that is added between stages; see `transition`.
        early: share of the cells that the mixed stage splits.
    """

    steps: tuple[int, int, int] = (5, 6, 7)
    ends: tuple[float, float] = (0.3, 0.45)
    shifts: tuple[float, float, float] = (5.019, 2.589, 2.226)
    z: float = 6.317
    early: float = 0.3

    name = "ralu"
    needs_decoder = "picture"
    published: ClassVar = {
        "4x": {},
        "5x": dict(steps=(4, 5, 6), shifts=(5.12, 2.64, 2.25), z=0.0177**-0.5, early=0.2),
        "7x": dict(steps=(2, 3, 5), ends=(0.2, 0.3), shifts=(8.141, 2.856, 2.193), z=6.261, early=0.1),
    }

    def validate(self) -> None:
        self.set("steps", resolution.check_stage_steps("steps", self.steps))
        self.set("z", _above("z", self.z, 2, "a number of at least 2"))
        expected = "three numbers above 0"
        given = sequence("shifts", self.shifts, 3, expected)
        self.set("shifts", tuple(_above("shifts", h, math.ulp(0), expected) for h in given))
        self.set("early", share("early", self.early))
        self._check_ends()

    def _check_ends(self) -> None:
        """A stage starts where the noise that is added puts it, and has to end below."""
        expected = "two numbers (e1, e2) with 0 < e1 < 1 and e1/(z*(1-e1)+e1) < e2 < 1"
        e1, e2 = (number("ends", e, expected) for e in sequence("ends", self.ends, 2, expected))
        if not (0 < e1 < 1 and 1 - raised(1 - e1, self.z) < e2 < 1):
            raise ValueError(f"ends: expected {expected}, got {self.ends!r}")
        self.set("ends", (e1, e2))

    @property
    def nfe(self) -> int:
        return sum(self.steps)

    def with_steps(self, n: int) -> Ralu:
        return replace(self, steps=resolution.scale_stage_steps(self, self.steps, n))

    def sigmas(self, stage: int) -> list[float]:
        """Noise levels of a stage, 0 to 2, from its start to its end."""
        first = 1.0 if stage == 0 else raised(1 - self.ends[stage - 1], self.z)
        last = 0.0 if stage == 2 else 1 - self.ends[stage]
        result: list[float] = shifted_sigmas(self.shifts[stage], first, last, self.steps[stage]).tolist()
        return [first, *result[1:-1], last]  # rounding in the map must not move the ends

    def planned_stages(self, run: MethodRun) -> list[PlannedStage]:
        return resolution.planned_stages(self.steps, self.early)

    def edit(self, run: Run, edit_mask: Any = None) -> Outcome:
        state = run.state
        resolution.check_size(self, state)
        inner, layout = resolution.without_key_bias(run), MixedLayout.all_coarse(state.grid, state.device)
        groups = [group_at(inner, list(range(state.batch)), layout, start_tokens(state.noise, layout), self.sigmas(0))]
        run_stage(inner, "coarse", groups, keep_clean=True)
        counts = split = None
        if not run.trace.interrupted:
            counts = resolution.edge_shares(inner, groups[0])
            split = resolution.top_share(resolution.ties_broken(counts, state), self.early)
            groups = self._enter(inner, groups, 1, split_layouts(state.grid, split, counted=2))
            run_stage(inner, "mixed", groups)
        if not run.trace.interrupted:
            fine = MixedLayout.all_fine(state.grid, state.device)
            groups = self._enter(inner, groups, 2, [fine] * state.batch)
            run_stage(inner, "full", groups)
        score = None if counts is None else to_tokens(counts, state.grid)
        return outcome_of(run, groups, edit_mask, score=score, refined=split)

    def _enter(self, run: Run, groups: list[LayoutGroup], stage: int, layouts: list[MixedLayout]) -> list[LayoutGroup]:
        """The groups of a stage after the first."""
        noise, sigma = run.state.draw(run.state.grid.tokens), groups[0].sigmas[-1]

        def move(row: int, tokens: Tensor, old: MixedLayout, new: MixedLayout) -> Tensor:
            return transition(tokens, old, new, sigma, self.z, noise[row : row + 1])

        return resolution.regroup(run, groups, layouts, lambda layout: self.sigmas(stage), move)


def raised(sigma: float, z: float) -> float:
    """The noise level after `transition`: z*sigma / (z*sigma + 1 - sigma), which is 1 - s of the paper's eq. 7."""
    return z * sigma / (z * sigma + 1 - sigma)


def transition(tokens: Tensor, old: MixedLayout, new: MixedLayout, sigma: float, z: float, noise: Tensor) -> Tensor:
    """Repeat the pixels of cells that are split, and make the noise white again: x' = beta up(x) + sigma' n'.

    Repeated noise has covariance J, all ones, in a block of 2 x 2 pixels. With beta = 1/(z*sigma + 1 - sigma) and n' of
    covariance I - cJ, c = 1/z^2, the sum has covariance sigma'^2 I, and the signal is (1 - sigma') x0. Tokens that keep
    their resolution have covariance I in place of J.

    Args:
        tokens: (B, old.tokens, C) at noise level `sigma`.
        noise: (B, grid.tokens, C) white noise on the fine grid.

    Returns:
        (B, new.tokens, C) at noise level `raised(sigma, z)`.
    """
    grid, c = new.grid, 1 / z**2
    kept = math.sqrt(1 - c)
    fine, born = kept * noise, MixedLayout(grid, new.expanded & ~old.expanded).fine_tokens
    fine[:, born] = decorrelating(noise, grid, c)[:, born]
    coarse = kept * coarsen_noise(noise, grid)[:, new.locked_cells]
    added = torch.cat([coarse, fine[:, new.fine_tokens]], 1)
    beta = 1 / (z * sigma + 1 - sigma)
    return beta * resolution.repeated(tokens, old, new) + raised(sigma, z) * added


def decorrelating(noise: Tensor, grid: TokenGrid, c: float) -> Tensor:
    """White noise (B, N, C) as noise of covariance I - cJ in every block of 2 x 2 latent pixels.

    n - (1 - sqrt(1 - k c)) mean(n) for the k pixels of a block, which an odd side cuts where tokens are single pixels.
    """
    image = grid.geometry.to_image(noise, grid.shape)
    (height, width), device = image.shape[-2:], image.device
    inside = F.avg_pool2d(F.pad(torch.ones(1, 1, height, width, device=device), (0, width % 2, 0, height % 2)), 2) * 4
    mean = F.avg_pool2d(F.pad(image, (0, width % 2, 0, height % 2)), 2) * 4 / inside
    less = (1 - (1 - c * inside).sqrt()) * mean
    less = less.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :height, :width]
    return grid.geometry.from_image(image - less)


def _above(name: str, value: Any, low: float, expected: str) -> float:
    checked = number(name, value, expected)
    if not (math.isfinite(checked) and checked >= low):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return checked
