"""SpotEdit (arXiv 2512.22323): the whole picture at full resolution, without the tokens that look like the reference.

After a few full steps the clean estimate x - s v is compared with the reference in the first features of the decoder
(section 4.1). Tokens that agree are skipped: they are no queries, keep the velocity they had last, and end as the
reference's own latents. Their keys and values, and those of the reference, are kept from the last full step (section
4.2). Some full steps between refresh them.

Followed is the public code (Biangbiang0321/SpotEdit), except for the fusion:

- FLUX_kontext/flux_spot_ultis.py and Qwen_image_edit/qwen_spot_ultis.py have the thresholds, the 4 initial steps and
  the full steps 13, 22 and 31 of 50, which the paper leaves out.
- FLUX_kontext/FLUXLPIPS.py has equal weights of the layers, resized to the latents and averaged over a token's patch.
- FLUX_kontext/flux_spotedit.py selects at every step; Qwen_image_edit/qwen_spotedit.py once after every full step, and
  dilates what is edited by one token. Its loop runs the prompt alone; here both guidance branches skip the same tokens.
- The smoothing of the boundary in flux_spotedit.py comes after the skipped tokens have become the reference's, and
  changes nothing. It is left out.
- Fusion follows the paper (eq. 8 and 9): kept keys and values move towards the reference's at every step,
  k <- a k + (1 - a) k_ref with a = cos^2(pi t / 2). In the code (FLUX_kontext/fluxSpotAttn.py) t is divided by 1000
  twice, so that a is 1 and nothing moves: that is `fusion="none"`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import integer, number, suggest
from ..forecast import Fusion
from ..layout import TokenGrid
from ..method.adapter import Adapter, LayoutGroup, Run
from ..method.sampler import Outcome
from ..method.schedule import Stage
from ..method.selectors import dilate, not_finite
from ..method.selectors.semantic import beside, discrepancy
from ..method.token_steps import (
    end_regions,
    hears_prompt,
    index_of,
    known_tokens,
    reference_tokens,
    refusal,
    some_velocity,
    start_regions,
    whole_velocity,
)
from ..method_options import Method, register_method
from ..method_plan import MethodRun, PlannedStage, StepKind
from .shared import outcome_of, planned_regions, run_steps

COUNT, INITIAL, RESETS = 50, 4, (13, 22, 31)
FLUX: dict[str, Any] = dict(threshold=0.2, dilation=0, reselect=True)
QWEN: dict[str, Any] = dict(threshold=0.15, dilation=1, reselect=False)
FUSIONS = ("cosine", "none")


@register_method
@dataclass(frozen=True)
class SpotEdit(Method):
    """SpotEdit.

    Args:
        count: model evaluations, at least 1.
        initial: full steps before the first selection, from 1 to `count`. None: the source's, 4 of 50.
        resets: other full steps, counted from 0, ascending. None: the source's, 13, 22 and 31 of 50.
        threshold: tokens whose score (0 to 4) is below it are skipped. None: the source's, 0.2 or for Qwen 0.15.
        dilation: tokens by which the edited region grows. None: the source's, 0 or for Qwen 1.
        reselect: whether tokens are selected at every step, rather than after each full one. None: the source's, True
            or for Qwen False.
        fusion: "cosine", or "none" to attend to kept keys and values as they are.
    """

    count: int = COUNT
    initial: int | None = None
    resets: tuple[int, ...] | None = None
    threshold: float | None = None
    dilation: int | None = None
    reselect: bool | None = None
    fusion: str = "cosine"

    name = "spotedit"
    takes_mask = True
    needs_decoder = "features"
    own_attention = True
    published: ClassVar = {"default": {}}  # the rest depends on the model

    def validate(self) -> None:
        self.set("count", integer("count", self.count, 1))
        if self.initial is not None:
            expected = f"an integer from 1 to count={self.count}, or None"
            self.set("initial", integer("initial", self.initial, 1, expected))
            if self.initial > self.count:
                raise ValueError(f"initial: expected {expected}, got {self.initial}")
        if self.resets is not None:
            self.set("resets", _resets(self.resets, self.count))
        if self.threshold is not None:
            expected = "a number from 0 to 4, or None"
            self.set("threshold", number("threshold", self.threshold, expected))
            if not 0 <= self.threshold <= 4:
                raise ValueError(f"threshold: expected {expected}, got {self.threshold!r}")
        if self.dilation is not None:
            self.set("dilation", integer("dilation", self.dilation, 0, "an integer of at least 0, or None"))
        if self.reselect is not None and not isinstance(self.reselect, bool):
            raise TypeError(f"reselect: expected True, False or None, got {self.reselect!r}")
        if self.fusion not in FUSIONS:
            listed = " or ".join(map(repr, FUSIONS))
            raise ValueError(f"fusion: expected {listed}, got {self.fusion!r}{suggest(self.fusion, FUSIONS)}")

    @property
    def nfe(self) -> int:
        return self.count

    def with_steps(self, n: int) -> SpotEdit:
        """Full steps that were given keep their place in the run, as far as they differ."""
        initial, resets = self.initial, self.resets
        if initial is not None:
            initial = _initial(initial, n, self.count)
        if resets is not None:
            resets = _moved(resets, n, self.count)
        return replace(self, count=n, initial=initial, resets=resets)

    def refusal(self, adapter: Adapter) -> str | None:
        return refusal(adapter)

    def for_model(self, adapter: Adapter) -> SpotEdit:
        """With the source's settings for a model and the number of steps where none were given."""
        settings = dict(QWEN if adapter.name.startswith("qwen") else FLUX)
        settings["initial"] = _initial(INITIAL, self.count, COUNT)
        settings["resets"] = _moved(RESETS, self.count, COUNT)
        return replace(self, **{name: value for name, value in settings.items() if getattr(self, name) is None})

    def full(self, step: int) -> bool:
        """Whether a step is one of those that compute every token. Of options `for_model`."""
        assert self.initial is not None and self.resets is not None
        return step < self.initial or step in self.resets

    def planned_stages(self, run: MethodRun) -> list[PlannedStage]:
        options = self.for_model(run.adapter)
        steps: list[StepKind] = ["all" if options.full(i) else "some" for i in range(self.count)]
        return planned_regions(self, steps, run, needs_locked=True)

    def edit(self, run: Run, edit_mask: Any = None) -> Outcome:
        options, state = self.for_model(run.adapter), run.state
        edited = known_tokens(run, edit_mask)
        groups = start_regions(run, Stage("full", 1.0, 0.0, self.count), edited)
        regions = [Region(options, run, group, None if edited is None else ~edited[group.rows]) for group in groups]

        def step(i: int) -> None:
            for region in regions:
                region.step(i)

        run_steps(run, "full", groups, step)
        if run.trace.steps == self.count:  # an interrupted run has nothing clean to end with
            for region in regions:
                region.end()
        detected = end_regions(run, groups, [~region.locked for region in regions])
        scores = [region.score for region in regions if region.score is not None]  # of one sample each, in their order
        score = torch.cat(scores) if len(scores) == state.batch else None
        lost = 0 if score is None else int(not_finite(score).sum())
        return replace(outcome_of(run, groups, edit_mask, detected=detected, score=score), overflowed=lost)


class Region:
    """One group of the batch under way.

    skipped: (b, N) bool, tokens left out of the step, equally many in every row. locked: those of the last step that
    left any out, which end as the reference's. velocity: (b, N, C) of every token, when it was computed last.
    """

    def __init__(self, options: SpotEdit, run: Run, group: LayoutGroup, known: Tensor | None):
        self.options, self.run, self.group, self.known = options, run, group, known
        self.skipped = torch.zeros(group.tokens.shape[:2], dtype=torch.bool, device=group.tokens.device)
        self.locked = self.skipped
        self.score: Tensor | None = None
        self.features: list[Tensor] | None = None  # of the reference
        self.velocity = self.clean = torch.empty(0)
        self.selects = True
        self.sources = reference_tokens(run)
        of_rows = {name: getattr(run.state, name)[group.rows] for name in ("noise", "reference")}
        self.own = replace(run.state, **of_rows)  # the state of these samples alone

    def step(self, i: int) -> None:
        """Eq. 3, over the tokens that are not skipped."""
        sigma, following = self.group.sigmas[i : i + 2]
        if self.options.full(i) or not hears_prompt(self.run, self.group):
            self.skipped, self.selects = torch.zeros_like(self.skipped), True
        else:
            self.select()
        if not bool(self.skipped.any()):
            last = i + 1 == self.options.count
            self.velocity = whole_velocity(self.run, self.group, i, keep=not last and not self.options.full(i + 1))
        else:
            self.locked = self.skipped
            self.compute(i, sigma)
        self.clean = self.group.tokens - sigma * self.velocity
        self.group.tokens = self.group.tokens + (following - sigma) * self.velocity

    def select(self) -> None:
        """Which tokens this step skips (eq. 6)."""
        if self.known is not None:
            self.skipped = self.known
        elif self.selects:
            self.skipped = self.unchanged()
            self.selects = bool(self.options.reselect)

    def unchanged(self) -> Tensor:
        """(b, N) bool: tokens whose clean estimate looks like the reference."""
        run, grid, covered = self.run, self.run.state.grid, self.run.state.covered
        assert self.options.threshold is not None and self.options.dilation is not None
        if self.features is None or covered is not None:  # beyond the picture, the reference is the estimate itself
            self.features = run.adapter.features(run.pipe, beside(self.clean, self.own), grid)
        self.score = token_score(run.adapter.features(run.pipe, self.clean, grid), self.features, grid)
        changed = ~(self.score < self.options.threshold)  # what is not finite counts as changed
        if covered is not None:
            changed = changed | ~covered
        return ~dilate(changed, self.options.dilation).flatten(1)

    def compute(self, i: int, sigma: float) -> None:
        """The velocity of the tokens that are not skipped."""
        index = index_of(~self.skipped)
        if not index.shape[1]:  # nothing is left to compute
            self.group.cached += 1
            return
        fusion = None
        if self.options.fusion == "cosine":
            skipped = index_of(self.skipped)
            fusion = Fusion(skipped, self.sources[skipped], fusion_weight(sigma))
        fresh = some_velocity(self.run, self.group, i, index, fusion)
        self.velocity = self.velocity.scatter(1, index[..., None].expand_as(fresh), fresh)

    def end(self) -> None:
        """Locked tokens become the reference's own."""
        self.group.tokens = torch.where(self.locked[..., None], self.own.aligned, self.group.tokens)


def fusion_weight(t: float) -> float:
    """alpha(t) = cos^2(pi t / 2) of section 4.2, at the noise level t in 0..1: how much of the kept keys stays."""
    return math.cos(math.pi * t / 2) ** 2


def token_score(first: list[Tensor], second: list[Tensor], grid: TokenGrid) -> Tensor:
    """Eq. 5 with equal weights: (B, h, w) float32 in 0..4 of decoder features (B, c, h', w') of two pictures.

    The squared distance of channel-normalised features, resized to the latents, averaged over layers and then over the
    latents of each token.
    """
    patch = grid.geometry.patch
    score = discrepancy(first, second, (patch * grid.height, patch * grid.width), antialias=False)
    pooled: Tensor = F.avg_pool2d(score[:, None], patch)[:, 0]
    return pooled


def _initial(initial: int, n: int, count: int) -> int:
    """So many of `count` steps, of `n`: at least one."""
    return min(n, max(1, round(initial * n / count)))


def _moved(steps: tuple[int, ...], n: int, count: int) -> tuple[int, ...]:
    """Steps of `count` at their place among `n`."""
    return tuple(sorted({step for step in (round(step * n / count) for step in steps) if 1 <= step < n}))


def _resets(value: Any, count: int) -> tuple[int, ...]:
    expected = f"ascending integers from 1 to {count - 1}, below count={count}"
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"resets: expected {expected}, got {value!r} ({type(value).__name__})")
    steps = tuple(integer("resets", step, 1, expected) for step in value)
    if list(steps) != sorted(set(steps)) or any(step >= count for step in steps):
        raise ValueError(f"resets: expected {expected}, got {value!r}")
    return steps
