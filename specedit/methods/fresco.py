"""Fresco: coarse tokens that have converged become fine first, and one noise field serves all resolutions.

Zheng et al., "From Sketch to Fresco: Efficient Diffusion Transformer with Progressive Resolution", arXiv 2601.07462.
Public notes on it name github.com/DarrenZheng303/Fresco as its code, which could not be read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..checks import share, suggest
from ..field_checks import boundaries
from ..layout import MixedLayout
from ..method.adapter import LayoutGroup, Run
from ..method.expand import coarsen_noise, renoise
from ..method.groups import new_group, split_layouts, start_tokens
from ..method.sampler import Outcome
from ..method.schedule import Stage, expanded_sigma
from ..method.selectors import to_tokens
from ..method_options import Method, register_method
from ..method_plan import MethodRun, PlannedStage
from . import resolution
from .shared import outcome_of, run_stage

CHOICES = {
    "select": ("variance", "edges", "random"),
    "noise": ("unified", "fresh"),
    "expansion": ("hadamard", "interpolated"),
}


@register_method
@dataclass(frozen=True)
class Fresco(Method):
    """Three stages: all tokens coarse, the cells that vary least over time split, all tokens fine.

    The paper names v_i = Var_t(z_i), of a token over the steps, and promotes v_i <= tau first. Tau is here the quantile
    `early`. The noise field that it draws for every position is the call's own noise, and a coarse token's noise is the
    sum coefficient of its cell, so that all resolutions hold the same field; see `transition`. It leaves out stages,
    tau and noise levels: the steps and `early` are those that cost what it reports for FLUX.1 (2.87x, 4.72x and, on
    FLUX.1-schnell, 10.27x fewer operations with 30, 18 and 9 evaluations); the boundaries are SpecEdit's. Scales of the
    Hadamard expansion, which the paper writes without, keep the noise white. The reference has the target's layout.

    Args:
        steps: model evaluations of the coarse, mixed and full stage.
        boundaries: sigmas at which the coarse and the mixed stage end.
        early: share of the cells that the mixed stage splits.
        select: "variance"; "edges" or "random" cells, as the paper's ablations. Edges are found as in `Ralu`.
        noise: "unified", or "fresh" noise at every change of resolution, as the ablation.
        expansion: "hadamard", or "interpolated" tokens without detail of their own, as the ablation.
    """

    steps: tuple[int, int, int] = (7, 6, 5)
    boundaries: tuple[float, float] = (0.7, 0.55)
    early: float = 0.45
    select: Literal["variance", "edges", "random"] = "variance"
    noise: Literal["unified", "fresh"] = "unified"
    expansion: Literal["hadamard", "interpolated"] = "hadamard"

    name = "fresco"
    published: ClassVar = {"30": dict(steps=(11, 11, 8)), "18": {}, "9": dict(steps=(4, 2, 3))}

    def validate(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                listed = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
                raise ValueError(f"{name}: expected {listed}, got {value!r}{suggest(value, choices)}")
        self.set("steps", resolution.check_stage_steps("steps", self.steps))
        self.set("boundaries", boundaries(self.boundaries))
        self.set("early", share("early", self.early))

    @property
    def needs_decoder(self) -> Literal["picture"] | None:  # type: ignore[override]
        return "picture" if self.select == "edges" else None

    @property
    def nfe(self) -> int:
        return sum(self.steps)

    def with_steps(self, n: int) -> Fresco:
        return replace(self, steps=resolution.scale_stage_steps(self, self.steps, n))

    @property
    def stages(self) -> list[Stage]:
        """The stages, each of which starts where the expansion leaves the noise."""
        s1, s2 = self.boundaries
        coarse, mixed, full = self.steps
        return [
            Stage("coarse", 1.0, s1, coarse),
            Stage("mixed", expanded_sigma(s1), s2, mixed),
            Stage("full", expanded_sigma(s2), 0.0, full),
        ]

    def planned_stages(self, run: MethodRun) -> list[PlannedStage]:
        return resolution.planned_stages(self.steps, self.early)

    def edit(self, run: Run, edit_mask: Any = None) -> Outcome:
        state = run.state
        resolution.check_size(self, state)
        inner, layout = resolution.without_key_bias(run), MixedLayout.all_coarse(state.grid, state.device)
        coarse, mixed, full = self.stages
        tokens = start_tokens(state.noise, layout)
        groups = [new_group(inner, list(range(state.batch)), layout, tokens, coarse, coarse.start)]
        states = [tokens]
        run_stage(
            inner, coarse.name, groups, keep_clean=self.select == "edges",
            watch=lambda: states.append(groups[0].tokens),
        )  # fmt: skip
        score = split = None
        if not run.trace.interrupted:
            score, order = self._scores(inner, groups[0], states)
            split = resolution.top_share(order, self.early)
            groups = self._enter(inner, groups, mixed, split_layouts(state.grid, split))
            run_stage(inner, mixed.name, groups)
        if not run.trace.interrupted:
            fine = MixedLayout.all_fine(state.grid, state.device)
            groups = self._enter(inner, groups, full, [fine] * state.batch)
            run_stage(inner, full.name, groups)
        score = None if score is None else to_tokens(score, state.grid)
        return outcome_of(run, groups, edit_mask, score=score, refined=split)

    def _scores(self, run: Run, group: LayoutGroup, states: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Two of (B, cells_h, cells_w): what the report shows, and the scores of which the largest are split early."""
        if self.select == "edges":
            shares = resolution.edge_shares(run, group)
            return shares, resolution.ties_broken(shares, run.state)
        variance = temporal_variance(states).view(run.state.batch, *run.state.grid.coarse().shape)
        return variance, -variance if self.select == "variance" else resolution.random_scores(run.state)

    def _enter(
        self, run: Run, groups: list[LayoutGroup], stage: Stage, layouts: list[MixedLayout]
    ) -> list[LayoutGroup]:
        """The groups of a stage after the first."""
        state, sigma = run.state, groups[0].sigmas[-1]
        noise = state.noise if self.noise == "unified" else state.draw(state.grid.tokens)

        def sigmas(layout: MixedLayout) -> list[float]:
            found: list[float] = run.adapter.sigmas(
                run.pipe, layout.tokens, stage.start, stage.end, stage.steps
            ).tolist()
            return found

        def move(row: int, tokens: Tensor, old: MixedLayout, new: MixedLayout) -> Tensor:
            return transition(
                tokens, old, new, sigma, noise[row : row + 1], same_field=self.noise == "unified",
                hadamard=self.expansion == "hadamard",
            )  # fmt: skip

        return resolution.regroup(run, groups, layouts, sigmas, move)


def temporal_variance(states: list[Tensor]) -> Tensor:
    """(B, N) float32: the variance over the steps of every token (B, N, C), mean over its channels."""
    return torch.stack(states).var(0, correction=0).mean(-1)


def transition(
    tokens: Tensor, old: MixedLayout, new: MixedLayout, sigma: float, noise: Tensor, *, same_field: bool = True,
    hadamard: bool = True,
) -> Tensor:  # fmt: skip
    """Split cells, and raise the noise of all tokens from s to s' = 2s/(1+s), with k = (1 - s') / (1 - s) = 1/(1+s).

    Children are k z plus s' times the detail of the noise field, which is what the Hadamard matrix makes of z and three
    noises of variance (2s)^2. Tokens that keep their resolution become k z + (s' - k s) e: where z = (1-s) x0 + s e
    holds the field e already, all of them end at (1-s') x0 + s' e, with the same e at every resolution.

    Args:
        tokens: (B, old.tokens, C) at noise level s = `sigma`.
        noise: (B, grid.tokens, C), the field on the fine grid.
        same_field: whether the tokens hold this field's noise. If not, what is kept gets sqrt(s'^2 - (k s)^2) e.
        hadamard: whether children get the field's detail. If not, they are treated as what is kept.

    Returns:
        (B, new.tokens, C) at noise level s'.
    """
    grid, target = new.grid, expanded_sigma(sigma)
    keep = (1 - target) / (1 - sigma)
    raised, field = resolution.repeated(tokens, old, new), start_tokens(noise, new)
    if same_field:
        kept = keep * raised + (target - keep * sigma) * field
    else:
        kept = renoise(raised, sigma, target, field)
    if not hadamard:
        return kept
    coarse = MixedLayout.all_coarse(grid, noise.device)
    detail = field - resolution.repeated(coarsen_noise(noise, grid), coarse, new) / 2
    born = torch.zeros(grid.tokens, dtype=torch.bool, device=noise.device)
    born[MixedLayout(grid, new.expanded & ~old.expanded).fine_tokens] = True
    split = torch.cat([born.new_zeros(len(new.locked_cells)), born[new.fine_tokens]])
    return torch.where(split[:, None], keep * raised + target * detail, kept)
