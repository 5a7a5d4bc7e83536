"""SpargeAttention (arXiv 2502.18137): the stock sampler with attention that skips blocks of keys.

Before every attention call the attention map is predicted from the means of blocks of queries and keys, and blocks of
keys that get little of it are not read (section 3.2, `specedit.method.sparse_blocks`).

The public code (thu-ml/SpargeAttn) is followed for what the paper leaves open or has otherwise:

- spas_sage_attn/utils.py: similarity is the cosine between a block's tokens (the paper divides by the largest product),
  the products of the means are scaled as attention is, and at least one block of a row is kept.
- spas_sage_attn/core.py: theta = 0.6 and tau = 0.98 of `spas_sage2_attn_meansim_cuda`, the mean of all keys that is
  taken away before, and the simple variant that the authors recommend, half of the blocks of each row with theta = -0.1
  (`spas_sage2_attn_meansim_topk_cuda`). The paper tunes theta and tau for each layer by calibration; here they are the
  same in all.
- evaluate/flux_example.py has 50 steps, and modify_flux.py leaves tokens row by row, without the Hilbert curve of
  section 3.7.

Quantisation and the filter inside the softmax (sections 3.4 and 3.5) belong to the authors' kernels and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from ..checks import integer, number, share
from ..method.adapter import Adapter, LayoutGroup, Run
from ..method.denoise import forward_calls
from ..method.sampler import Outcome
from ..method.schedule import Stage
from ..method.sparse_blocks import BlockPredictor
from ..method_options import Method, register_method
from ..method_plan import MethodRun, PlannedStage, all_steps
from .shared import outcome_of, run_steps, start_fine

TAU = 0.98


@register_method
@dataclass(frozen=True)
class Sparge(Method):
    """SpargeAttention.

    Args:
        count: model evaluations, at least 1.
        theta: blocks whose tokens have a mean cosine similarity of at most this are always computed, from -1 to 1.
        tau: share of the predicted attention that kept blocks may reach, above 0, at most 1. No effect with `top`.
        top: None, or the share of the key blocks that every query block reads besides those, above 0, at most 1.
    """

    count: int = 50
    theta: float = 0.6
    tau: float = TAU
    top: float | None = None

    name = "sparge"
    own_attention = lists_blocks = True
    published: ClassVar = {"default": {}, "top-0.5": dict(top=0.5, theta=-0.1)}

    def validate(self) -> None:
        self.set("count", integer("count", self.count, 1))
        expected = "a number from -1 to 1"
        self.set("theta", number("theta", self.theta, expected))
        if not -1 <= self.theta <= 1:
            raise ValueError(f"theta: expected {expected}, got {self.theta!r}")
        self.set("tau", share("tau", self.tau))
        if self.top is not None:
            self.set("top", share("top", self.top))
            if self.tau != TAU:
                raise ValueError(f"tau: expected the default, {TAU}, with top={self.top}, got {self.tau!r}")

    @property
    def nfe(self) -> int:
        return self.count

    def with_steps(self, n: int) -> Sparge:
        return replace(self, count=n)

    def refusal(self, adapter: Adapter) -> str | None:
        return None if adapter.skips_blocks else f"because {adapter.name} takes no lists of attention blocks"

    def planned_stages(self, run: MethodRun) -> list[PlannedStage]:
        if (self.tau if self.top is None else self.top) < 1:
            raise ValueError(
                "method: 'sparge' reads as many blocks of keys as the picture calls for, so its cost is known "
                f"beforehand with tau=1 or top=1 alone; got {self.label}"
            )
        return [all_steps("full", "fine", self.count)]

    def edit(self, run: Run, edit_mask: Any = None) -> Outcome:
        groups = start_fine(run, Stage("full", 1.0, 0.0, self.count))
        (group,) = groups
        group.blocks = BlockPredictor(self.theta, self.tau if self.top is None else None, self.top)
        shares: list[Tensor] = []
        run_steps(run, "full", groups, lambda i: shares.append(self._step(run, group, i)))
        self._count(run, group, [float(kept) for kept in shares])
        return outcome_of(run, groups, edit_mask)

    @staticmethod
    def _step(run: Run, group: LayoutGroup, i: int) -> Tensor:
        """An Euler step; the share of attention pairs that it computed."""
        assert group.blocks is not None
        sigma, following = group.sigmas[i : i + 2]
        run.set_current_timestep(sigma)
        group.tokens = group.tokens + (following - sigma) * run.adapter.velocity(run, group, sigma)
        return group.blocks.take_share()

    @staticmethod
    def _count(run: Run, group: LayoutGroup, shares: list[float]) -> None:
        """Add the steps' forward calls to the trace, with the keys that a query read on average."""
        for kept in shares:
            for call in forward_calls(run, group, run.state.branches):
                run.trace.calls.append(replace(call, keys=kept * call.tokens))
