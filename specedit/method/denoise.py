"""One Euler step of samples that share a layout (paper, section 3.4.3): computed, wholly or in part, or forecast."""

from __future__ import annotations

from torch import Tensor

from ..forecast import PartialForward
from .adapter import LayoutGroup, Run, active_branches
from .reference_selection import shorten_reference
from .trace import ForwardCall, step_calls, with_fixed_reference


def euler_step(run: Run, group: LayoutGroup, i: int, *, keep_clean: bool = False) -> None:
    """Eq. 11: step `i` of the group's stage, x += (s' - s) v. `keep_clean`: its clean prediction x - s v too."""
    sigma, following = group.sigmas[i : i + 2]
    velocity = group_velocity(run, group, i)
    if keep_clean:
        group.clean = group.tokens - sigma * velocity
    group.tokens = group.tokens + (following - sigma) * velocity


def group_velocity(run: Run, group: LayoutGroup, i: int) -> Tensor:
    """Velocity (b, N, C) of step `i`, whose forward calls are added to the trace."""
    computed = group.computed
    velocity = computed_velocity(run, computed, i)
    if computed.mass is not None:
        shorten_reference(computed)
    return velocity if group.locked is None else group.locked.join(group, i, velocity)


def computed_velocity(run: Run, group: LayoutGroup, i: int) -> Tensor:
    """The velocity of the tokens that the transformer computes in step `i`."""
    adapter, sigma = run.adapter, group.sigmas[i]
    run.set_current_timestep(sigma)
    branches, prompt = active_branches(run.state, run.config, sigma), run.state.conditioning.prompt_embeds

    def compute(partial: list[PartialForward] | None) -> list[Tensor]:
        if group.kv is not None:
            group.kv.reset_if_prompt_changed(prompt)
            partial = group.kv.calls(i, branches)
            group.reused += partial[0].partial
        run.trace.calls += forward_calls(run, group, branches, partial[0] if partial else None, first=i == 0)
        return adapter.predict(run, group, sigma, partial)

    if group.forecast is None and group.kv is None:
        run.trace.calls += forward_calls(run, group, branches, first=i == 0)
        return adapter.velocity(run, group, sigma)
    if group.forecast is None:
        return adapter.guide(run, compute(None))
    group.forecast.reset_if_prompt_changed(prompt)
    outputs = group.forecast.step(i, sigma, compute)
    group.cached += not group.forecast.last_step.full
    if (operations := group.forecast.last_step.flops) > 0:
        each = operations / (len(group.rows) * branches)
        run.trace.calls.append(ForwardCall(stage_of(run), 0, samples=len(group.rows), count=branches, forecast=each))
    return adapter.guide(run, outputs)


def forward_calls(
    run: Run, group: LayoutGroup, branches: int, partial: PartialForward | None = None, first: bool = True
) -> list[ForwardCall]:
    """The forward calls of one step over all tokens of a group, or over those that `partial` asks for.

    first: whether it is the stage's first.
    """
    calls = step_calls(
        stage_of(run), run.state.texts[:branches], group.layout.tokens, group.reference_layout.tokens,
        samples=len(group.rows), trims=run.state.trims_last_block,
        alone=run.state.fixed_prefix or (partial is not None and partial.target),
        fresh=None if partial is None or partial.index is None else partial.index.shape[1],
        measured=0 if group.mass is None else len(group.mass.rows),
    )  # fmt: skip
    return with_fixed_reference(calls, group.reference_layout.tokens, first) if run.adapter.fixed_reference else calls


def stage_of(run: Run) -> str:
    """The name of the stage under way; empty for steps outside of one."""
    return "" if run.trace.stage is None else run.trace.stage.name
