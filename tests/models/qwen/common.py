"""What several tests in this folder use."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specedit.method.adapter import Run
from specedit.testing.family import group_of

QUICK = dict(steps=(2, 1, 1), draft_steps=2)
GUIDED = dict(negative_prompt="blue and dark", true_cfg_scale=2.5)


def velocity(adapter, pipe, state, layout, config, rows=None, seed=3, sigma=0.6):
    rows = list(range(state.batch)) if rows is None else rows
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randn(state.batch, layout.tokens, state.noise.shape[2], generator=draw)[rows]
    group = group_of(state, layout, tokens, rows)
    with torch.no_grad():
        return adapter.velocity(Run(adapter, pipe, config, state), group, sigma)


def close(a, b, tolerance=2e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Taps(TorchDispatchMode):
    """The taps in time of every convolution of frames that is computed inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default and args[1].ndim == 5:
            self.seen.append(args[1].shape[2])
        return func(*args, **(kwargs or {}))
