"""What the tests of adapters share: a model family under test, and how its parts are looked at."""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specedit.layout import MixedLayout
from specedit.method.sampler import restrict


@dataclass
class Family:
    """A model family under test.

    adapter: its class. make: makes equal pipelines that share nothing. call: (height, width) to the arguments of one
    call whose reference covers the output. guided: arguments that switch true classifier-free guidance on, or None.
    batch: (n) to arguments that make a call edit n pictures, or None where the pipeline takes only one. fullgraph:
    whether its blocks compile without a graph break. runs_others: whether attention="stock" runs other processors than
    diffusers'. compiles_as: the family whose compiled code this one shares; its tests of torch.compile run there.
    """

    adapter: type
    make: Callable[[], Any]
    call: Callable[[int, int], dict[str, Any]]
    guided: dict[str, Any] | None = None
    batch: Callable[[int], dict[str, Any]] | None = None
    fullgraph: bool = True
    runs_others: bool = False
    compiles_as: str | None = None
    sizes: tuple[tuple[int, int], ...] = field(default=((128, 128), (160, 96)))

    def run(self, pipe, size=(128, 128), seed=0, **changes):
        """Latents of one call."""
        arguments = self.call(*size) | {"output_type": "latent"} | changes
        arguments.setdefault("generator", torch.Generator().manual_seed(seed))
        return pipe(**arguments).images

    def prepare(self, pipe, size=(128, 128), attention="auto", **changes):
        """(adapter, state) of one call, as an installation makes them."""
        adapter = self.adapter()
        adapter.attach(pipe)
        arguments = self.call(*size) | {"generator": torch.Generator().manual_seed(0)} | changes
        bound = inspect.signature(type(pipe).__call__).bind(pipe, **arguments)
        bound.apply_defaults()
        call = {name: value for name, value in bound.arguments.items() if name != "self"}
        with torch.no_grad():
            return adapter, adapter.prepare(pipe, call, attention)


class Shuffled:
    """A mixed layout whose tokens are listed in another order."""

    is_mixed, is_coarse, is_fine, unit = True, False, False, 1

    def __init__(self, layout: MixedLayout, order: torch.Tensor, move: bool = True):
        self.grid, self.tokens, self.area = layout.grid, layout.tokens, layout.area[order]
        self.picture = layout.picture
        self.positions = layout.positions[order] if move else layout.positions

    @property
    def parts(self):
        return (self,)


class Ops(TorchDispatchMode):
    """Names of the operators that ran inside."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, classes, args=(), kwargs=None):
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **kwargs or {})


def leaves_called(transformer):
    """Names of the modules with weights that are called, a list for each call of the transformer that is to come."""
    calls = []
    transformer.register_forward_pre_hook(lambda module, args: calls.append([]))
    for name, module in transformer.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda module, args, name=name: calls[-1].append(name))
    return calls


def mixed_layout(grid, share=0.4, seed=0):
    return MixedLayout(grid, torch.rand(grid.coarse().shape, generator=torch.Generator().manual_seed(seed)) < share)


def step_of(family, adapter, pipe, state, layout, config, sigma=0.5):
    """Calls the adapter on random tokens of a layout: `run(calls)` is what `branches` gives."""
    beside = state.beside(layout)
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randn(state.batch, layout.tokens, state.noise.shape[2], generator=draw)
    call = (pipe, state, tokens, sigma, list(range(state.batch)), layout, restrict(state.reference, beside), beside)

    @torch.no_grad()
    def run(calls=None):
        return adapter.branches(*call, config, calls)

    return run


def layouts(grid):
    return [mixed_layout(grid), MixedLayout.all_coarse(grid), MixedLayout.all_fine(grid)]


def trace(pipe):
    """What an installation may change on a pipeline."""
    hooks = [vars(module).get("forward") for module in pipe.transformer.modules()]
    return type(pipe), list(pipe.transformer.attn_processors.values()), hooks


def rotations(pipe, run):
    """(tokens, D) complex: what the transformer's last call in `run()` rotated its tokens by, text included. The axis
    that tells images apart is left out."""
    seen, rope = [], pipe.transformer.pos_embed
    hook = rope.register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        run()
    finally:
        hook.remove()
    first, second = seen[-1]
    table = torch.cat([second, first]) if first.is_complex() else torch.complex(first.double(), second.double())
    return table[:, table.shape[1] * rope.axes_dim[0] // sum(rope.axes_dim) :]


def at_one_place(layout, beside):
    """Index pairs (k, 2) of tokens of the output and of the references, one after the other, at one position."""
    positions = torch.cat([part.positions for part in beside.parts])
    return (layout.positions[:, None] == positions).all(-1).nonzero()
