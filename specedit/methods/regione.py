"""RegionE (arXiv 2510.25590): edited regions step by step, everything else in one step.

Three stages (section 4). Stabilisation: full steps. Region-aware generation: the clean estimate x - s v is compared
with the reference, and tokens that agree jump along their velocity to the end of the stage (eq. 5), because their
trajectories are straight. The others go on step by step and attend to kept keys and values of the rest and of the
reference (eq. 6). While velocities only shrink by a known factor, they are not computed either (eq. 7 to 9). A forced
full step in the middle refreshes what is kept, and the jumps begin anew from it. Smooth stage: full steps.

Constants come from the paper and the public code (Peyton-Chen/RegionE):

- RegionE/tool/RegionE.py has 28 steps with 6, 2 and a forced step 16, and each model's thresholds, as the paper.
- RegionE/FluxKontext/inplace.py and its siblings of Qwen have gamma, the fitted part of the decay. It belongs to 28
  steps; here its logarithm is interpolated over the run for any other number.
- RegionE/FluxKontext/utils.py has the morphology that the paper calls opening and closing: erosion by a cross of 3
  tokens, then dilation by a square of 5. Beyond the border nothing counts as edited.
- The step after the partition is always computed, one after a forced step need not be.

Where they differ, the paper is followed: a cached velocity is multiplied by all factors since it was computed (eq. 9);
the code takes the last one alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import integer, number
from ..layout import TokenGrid
from ..method.adapter import Adapter, LayoutGroup, Run
from ..method.sampler import Outcome
from ..method.schedule import Stage
from ..method.token_steps import (
    end_regions,
    hears_prompt,
    index_of,
    known_tokens,
    refusal,
    some_velocity,
    start_regions,
    whole_velocity,
)
from ..method_options import Method, register_method
from ..method_plan import MethodRun, PlannedStage, StepKind
from .shared import outcome_of, planned_regions, run_steps

COUNT, WARMUP, SMOOTH, REFRESH = 28, 6, 2, (16,)
FLUX: dict[str, Any] = dict(threshold=0.93, decay_threshold=0.04)
QWEN: dict[str, Any] = dict(threshold=0.80, decay_threshold=0.03)
GAMMA_FLUX = (
    0.8352, 0.9986, 1.0090, 1.0097, 1.0161, 1.0152, 1.0160, 1.0173, 1.0177, 1.0199, 1.0213, 1.0203, 1.0257, 1.0236,
    1.0235, 1.0278, 1.0302, 1.0311, 1.0352, 1.0371, 1.0391, 1.0459, 1.0498, 1.0581, 1.0693, 1.0866, 1.1090,
)  # fmt: skip
GAMMA_QWEN = (
    1.0195, 1.0233, 1.0243, 1.0185, 1.0321, 1.0208, 1.0260, 1.0233, 1.0258, 1.0292, 1.0316, 1.0306, 1.0289, 1.0347,
    1.0329, 1.0402, 1.0378, 1.0384, 1.0413, 1.0444, 1.0526, 1.0400, 1.0555, 1.0439, 1.0357, 1.0118, 0.7603,
)  # fmt: skip
GAMMA_QWEN_PLUS = (
    1.0186, 1.0241, 1.0236, 1.0205, 1.0298, 1.0221, 1.0248, 1.0246, 1.0269, 1.0275, 1.0323, 1.0311, 1.0298, 1.0353,
    1.0343, 1.0397, 1.0387, 1.0393, 1.0404, 1.0458, 1.0507, 1.0418, 1.0518, 1.0426, 1.0311, 1.0068, 0.7628,
)  # fmt: skip


@register_method
@dataclass(frozen=True)
class RegionE(Method):
    """RegionE. For models that its source does not name, the settings of FLUX.1-Kontext.

    Args:
        count: steps, at least 1.
        warmup: steps of the stabilisation stage, at least 1. None: the source's, 6 of 28.
        smooth: steps of the smooth stage, at least 0. None: the source's, 2 of 28.
        refresh: forced full steps in between, counted from 1, ascending and not adjacent. None: the source's, step 16
            of 28. They need a step of the region stage before and after them.
        threshold: tokens whose estimate has at most this cosine similarity to the reference are edited, from -1 to 1.
            None: the source's, 0.93 or for Qwen 0.8.
        decay_threshold: how far a velocity may decay before it is computed again, from 0 (always) to 1. None: the
            source's, 0.04 or for Qwen 0.03.
    """

    count: int = COUNT
    warmup: int | None = None
    smooth: int | None = None
    refresh: tuple[int, ...] | None = None
    threshold: float | None = None
    decay_threshold: float | None = None

    name = "regione"
    takes_mask = True
    own_attention = True
    published: ClassVar = {"default": {}}  # the rest depends on the model

    def validate(self) -> None:
        self.set("count", integer("count", self.count, 1))
        for name, low, high in (("warmup", 1, self.count), ("smooth", 0, self.count - 1)):
            expected = f"an integer from {low} to {high} with count={self.count}, or None"
            if (value := getattr(self, name)) is not None:
                self.set(name, integer(name, value, low, expected))
                if value > high:
                    raise ValueError(f"{name}: expected {expected}, got {value}")
        if self.warmup is not None and self.smooth is not None and self.warmup + self.smooth > self.count:
            raise ValueError(
                f"warmup, smooth: expected at most count={self.count} steps together, got {self.warmup} and "
                f"{self.smooth}"
            )
        if self.refresh is not None:
            self.set("refresh", self._checked_refresh())
        for name, low in (("threshold", -1), ("decay_threshold", 0)):
            expected, value = f"a number from {low} to 1, or None", getattr(self, name)
            if value is not None:
                self.set(name, number(name, value, expected))
                if not low <= value <= 1:
                    raise ValueError(f"{name}: expected {expected}, got {value!r}")

    def _checked_refresh(self) -> tuple[int, ...]:
        warmup, smooth = self._stages()
        first, last = warmup + 2, self.count - smooth - 1
        expected = f"ascending integers from {first} to {last}, no two of them adjacent"
        if not isinstance(self.refresh, (tuple, list)):
            raise TypeError(f"refresh: expected {expected}, got {self.refresh!r} ({type(self.refresh).__name__})")
        steps = tuple(integer("refresh", step, 1, expected) for step in self.refresh)
        if steps != _allowed(steps, warmup, smooth, self.count):
            raise ValueError(f"refresh: expected {expected}, got {self.refresh!r}")
        return steps

    def _stages(self) -> tuple[int, int]:
        """Steps of the stabilisation and of the smooth stage: the source's where none were given."""
        n = self.count
        smooth = min(n - 1, _length(SMOOTH, n, COUNT)) if self.smooth is None else self.smooth
        warmup = min(n - smooth, _length(WARMUP, n, COUNT)) if self.warmup is None else self.warmup
        return warmup, min(smooth, n - warmup)

    @property
    def nfe(self) -> int:
        return self.count

    def with_steps(self, n: int) -> RegionE:
        """What was given keeps its place in the run. A stage that had steps keeps one while `n` allows."""
        changes: dict[str, Any] = {"count": n}
        if self.warmup is not None:
            changes["warmup"] = min(n, _length(self.warmup, n, self.count))
        if self.smooth is not None:
            changes["smooth"] = min(n - changes.get("warmup", 1), _length(self.smooth, n, self.count))
        moved = replace(self, refresh=None, **changes)
        if self.refresh is None:
            return moved
        steps = tuple(round(step * n / self.count) for step in self.refresh)
        return replace(moved, refresh=_allowed(steps, *moved._stages(), n))

    def refusal(self, adapter: Adapter) -> str | None:
        return refusal(adapter)

    def for_model(self, adapter: Adapter) -> RegionE:
        """With the source's settings for a model and the number of steps where none were given."""
        warmup, smooth = self._stages()
        moved = tuple(round(step * self.count / COUNT) for step in REFRESH)
        settings = dict(QWEN if adapter.name.startswith("qwen") else FLUX)
        settings |= dict(warmup=warmup, smooth=smooth, refresh=_allowed(moved, warmup, smooth, self.count))
        given = {name: value for name in settings if (value := getattr(self, name)) is not None}
        return replace(self, **settings | given | dict(smooth=smooth))

    def full_steps(self) -> tuple[int, ...]:
        """The steps, from 0, that compute every token. Of options `for_model`."""
        assert self.warmup is not None and self.smooth is not None and self.refresh is not None
        end = self.count - self.smooth
        return (*range(self.warmup), *(step - 1 for step in self.refresh), *range(max(end, self.warmup), self.count))

    def planned_stages(self, run: MethodRun) -> list[PlannedStage]:
        options, sigmas = self.for_model(run.adapter), run.sigmas(run.grid.tokens, self.count)
        gamma, full = decay_factors(gamma_of(run.adapter), self.count), options.full_steps()
        steps: list[StepKind] = []
        decay = 1.0
        for i in range(self.count):
            if i not in full:
                decay, cached = options.decayed(i, decay, gamma, sigmas)
                steps.append("none" if cached else "some")
            else:
                steps.append("all")
            decay = decay if steps[-1] == "none" else 1.0
        return planned_regions(self, steps, run)

    def decayed(self, i: int, decay: float, gamma: Sequence[float], sigmas: Sequence[float]) -> tuple[float, bool]:
        """A velocity's decay at step `i` since it was computed (eq. 7), and whether it need not be computed again.

        decay: at the step before. Of options `for_model`.
        """
        assert self.warmup is not None and self.decay_threshold is not None
        factor = gamma[i - 1] * (1 + sigmas[i] - sigmas[i - 1])
        decay *= factor
        return decay, i > self.warmup and factor < 1 and 1 - decay <= self.decay_threshold

    def edit(self, run: Run, edit_mask: Any = None) -> Outcome:
        options, known = self.for_model(run.adapter), known_tokens(run, edit_mask)
        groups = start_regions(run, Stage("full", 1.0, 0.0, self.count), known)
        gamma = decay_factors(gamma_of(run.adapter), self.count)
        regions = [Region(options, run, g, gamma, None if known is None else known[g.rows]) for g in groups]

        def step(i: int) -> None:
            for region in regions:
                region.step(i)

        run_steps(run, "full", groups, step)
        detected = end_regions(run, groups, [region.edited for region in regions])
        return outcome_of(run, groups, edit_mask, detected=detected)


class Region:
    """One group of the batch under way.

    edited: (b, N) bool, equally many in every row; all before the partition. index: (b, m), where they are. velocity:
    (b, m, C) of the edited tokens, when it was computed last; decay: the product of the factors since then.
    """

    def __init__(self, options: RegionE, run: Run, group: LayoutGroup, gamma: tuple[float, ...], known: Tensor | None):
        self.options, self.run, self.group, self.gamma, self.known = options, run, group, gamma, known
        self.full = options.full_steps()
        self.edited = torch.ones(group.tokens.shape[:2], dtype=torch.bool, device=group.tokens.device)
        self.index = index_of(self.edited)
        self.velocity: Tensor | None = None
        self.decay = 1.0

    def step(self, i: int) -> None:
        """One step of the group's edited tokens, and of all others where it is a full one."""
        sigmas = self.group.sigmas
        if i in self.full:
            self.whole(i)
            return
        velocity = self.of_edited(i)
        if velocity is not None:
            moved = self.group.tokens.gather(1, self._at(velocity)) + (sigmas[i + 1] - sigmas[i]) * velocity
            self.group.tokens = self.group.tokens.scatter(1, self._at(moved), moved)

    def whole(self, i: int) -> None:
        """A full step. The last one before steps over the edited tokens sends all others to the next full one."""
        sigmas, last = self.group.sigmas, i + 1 >= self.options.count or i + 1 in self.full
        velocity = whole_velocity(self.run, self.group, i, keep=not last)
        tokens = self.group.tokens + (sigmas[i + 1] - sigmas[i]) * velocity
        if not last:
            if i + 1 == self.options.warmup:
                self.partition(self.group.tokens - sigmas[i] * velocity)
            arrival = min((step for step in self.full if step > i), default=self.options.count)
            straight = one_step(self.group.tokens, velocity, sigmas[i], sigmas[arrival])
            tokens = torch.where(self.edited[..., None], tokens, straight)
            self.velocity, self.decay = velocity.gather(1, self._at(velocity)), 1.0
        self.group.tokens = tokens

    def partition(self, clean: Tensor) -> None:
        """Which tokens are edited, from their clean estimate (b, N, C)."""
        state = self.run.state
        if self.known is not None:
            self.edited = self.known
        else:
            assert self.options.threshold is not None
            edited = edited_tokens(clean, state.aligned[self.group.rows], state.grid, self.options.threshold)
            self.edited = edited if state.covered is None else edited | ~state.covered.flatten()
        self.index = index_of(self.edited)

    def of_edited(self, i: int) -> Tensor | None:
        """Velocity (b, m, C) of the edited tokens at step `i`: cached (eq. 9) or computed. None if none are edited."""
        assert self.velocity is not None
        heard = hears_prompt(self.run, self.group)
        self.decay, cached = self.options.decayed(i, self.decay, self.gamma, self.group.sigmas)
        if not self.index.shape[1]:
            self.group.cached += 1
            return None
        if heard and cached:
            self.group.cached += 1
            return self.velocity * self.decay
        self.velocity, self.decay = some_velocity(self.run, self.group, i, self.index), 1.0
        return self.velocity

    def _at(self, like: Tensor) -> Tensor:
        """The edited tokens' index, for tensors (b, N or m, C)."""
        return self.index[..., None].expand(-1, -1, like.shape[2])


def edited_tokens(clean: Tensor, reference: Tensor, grid: TokenGrid, threshold: float) -> Tensor:
    """(B, N) bool: tokens (B, N, C) whose cosine similarity to the reference is at most the threshold, after erosion by
    a cross of 3 tokens and dilation by a square of 5. What is not finite counts as edited."""
    similarity = F.cosine_similarity(clean, reference, dim=-1)
    found = (~(similarity > threshold)).unflatten(1, grid.shape)[:, None].float()
    cross = found.new_tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]])[None, None]
    eroded = F.conv2d(found, cross, padding=1) == cross.sum()
    grown: Tensor = F.max_pool2d(eroded.float(), 5, stride=1, padding=2)[:, 0] > 0
    return grown.flatten(1)


def one_step(tokens: Tensor, velocity: Tensor, sigma: float, arrival: float) -> Tensor:
    """Eq. 5: tokens at the noise level `arrival`, straight along their velocity at `sigma`."""
    return tokens + (arrival - sigma) * velocity


def gamma_of(adapter: Adapter) -> tuple[float, ...]:
    """gamma of eq. 7, from each of 28 steps to the next: fitted by the source to its model."""
    models = {"qwen-image-edit": GAMMA_QWEN, "qwen-image-edit-plus": GAMMA_QWEN_PLUS}
    return models.get(adapter.name, GAMMA_QWEN if adapter.name.startswith("qwen") else GAMMA_FLUX)


def decay_factors(gamma: tuple[float, ...], count: int) -> tuple[float, ...]:
    """gamma from each of `count` steps to the next. The product over the whole run stays as it is, its logarithm is
    linear between the steps it was fitted for."""
    if count == len(gamma) + 1:
        return gamma
    total = [0.0, *accumulate(map(math.log, gamma))]

    def at(step: int) -> float:
        place = step * len(gamma) / (count - 1)
        low = min(int(place), len(gamma) - 1)
        return total[low] + (place - low) * (total[low + 1] - total[low])

    return tuple(math.exp(at(step + 1) - at(step)) for step in range(count - 1))


def _length(steps: int, n: int, count: int) -> int:
    """So many of `count` steps, of `n`: at least one, if there were any."""
    return max(min(steps, 1), round(steps * n / count))


def _allowed(steps: tuple[int, ...], warmup: int, smooth: int, count: int) -> tuple[int, ...]:
    """Those of `steps` that may be forced, ascending and not adjacent."""
    chosen: list[int] = []
    for step in sorted(set(steps)):
        if warmup + 1 < step <= count - smooth - 1 and not (chosen and step == chosen[-1] + 1):
            chosen.append(step)
    return tuple(chosen)
