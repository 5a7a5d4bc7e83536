"""A model that knows its answer, to see the states that a method gives it."""

from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from specedit import SpecEditConfig
from specedit.geometry import PACKED
from specedit.layout import TokenGrid
from specedit.method.adapter import Adapter, EditState, Run

CHANNELS = 8
PIPE = SimpleNamespace(interrupt=False, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


class Oracle(Adapter):
    """Its velocity points from where a state is to `target`, at every token's own resolution.

    seen: layout, tokens and noise level of every call. What it decodes is black.
    """

    name, pipelines = "oracle", "none"

    def __init__(self, target, geometry):
        self.target, self.geometry, self.seen = target, geometry, []

    def predict(self, run, group, sigma, partial=None):
        self.seen.append((group.layout, group.tokens, sigma))
        return [(group.tokens - group.layout.from_full_grid(self.target[group.rows])) / sigma]

    def guide(self, run, outputs):
        return outputs[0]

    def decode(self, pipe, state, tokens, output_type):
        return torch.zeros(len(tokens), 3, *(16 * side for side in state.grid.shape))

    matches = refusal = prepare = reference_offset = call_size = features = output = attach = detach = None

    @property
    def starts(self):
        """The first call on every layout."""
        pairs = zip([(None,), *self.seen], self.seen, strict=False)
        return [call for before, call in pairs if before[0] is not call[0]]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_run(method, shape=(8, 12), geometry=PACKED, target=None, samples=2):
    grid = TokenGrid(*shape, geometry)
    state = EditState(
        grid=grid, noise=normal(samples, grid.tokens, CHANNELS),
        reference=normal(samples, grid.tokens, CHANNELS, seed=1), reference_grid=grid,
        generator=torch.Generator().manual_seed(7), text_tokens=5, branches=1, pixels_per_token=16,
    )  # fmt: skip
    target = torch.zeros_like(state.noise) if target is None else target
    return Run(Oracle(target, geometry), PIPE, SpecEditConfig(method=method), state)


def edit(run):
    with torch.no_grad():
        return run.config.method_options.edit(run)
