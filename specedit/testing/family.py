"""What the tests of adapters share: a model family under test, and views of its tokens and calls."""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from specedit.api.accelerated import stock_of
from specedit.config import SpecEditConfig
from specedit.layout import MixedLayout
from specedit.method.adapter import LayoutGroup, Run
from specedit.method.groups import reference_on_layout

OTHERS = (((128, 128), (96, 160)), ((144, 112), (128, 128)), ((112, 144), (96, 128)), ((176, 80), (80, 176)))


def make_picture(height=128, width=128, seed=0):
    """A smooth random RGB picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@dataclass
class Family:
    """A model family under test. Options that name what a family lacks skip the tests of it.

    Args:
        adapter: its class.
        make: makes equal pipelines that share nothing that an installation changes. A tiny transformer with random
            weights will do; scale them up until the blocks matter.
        call: (height, width) to the arguments of one call whose reference covers the output.
        guided: arguments that switch true classifier-free guidance on, or None.
        batch: (n) to arguments that make a call edit n pictures, or None where the pipeline takes only one.
        sizes: (height, width) of the outputs of single calls, square and not.
        others: (height, width) of the output and of the picture where they differ, by even and by odd numbers of
            tokens; empty where the output always has the picture's size.
        attention: settings of `SpecEditConfig.attention` that the adapter runs.
        ropes: settings of `SpecEditConfig.rope` that the adapter runs.
        parts: components of the pipeline that a call runs before the result; none may run before an error.
        rotations: (pipe, run) to the table (tokens, D) by whose rows the transformer's last call in `run()` placed
            text, target and references, without the axis that tells pictures apart. None: there is no such table.
        fullgraph: whether its blocks compile without a graph break, by `compile_repeated_blocks`.
        compiles_as: the family whose compiled code this one shares; its tests of torch.compile run there.
        runs_others: whether attention="stock" runs other attention processors than diffusers'.
        masked: whether calls bring a mask of their own, so that none of them makes a draft. `run` takes `edit_mask` all
            the same, and gives it to the pipeline in its own way.
        sends_values: whether the transformer itself sends values from the host to the device in every step, or waits
            for some.
    """

    adapter: type
    make: Callable[[], Any]
    call: Callable[[int, int], dict[str, Any]]
    guided: dict[str, Any] | None = None
    batch: Callable[[int], dict[str, Any]] | None = None
    fullgraph: bool = True
    compiles_as: str | None = None
    runs_others: bool = False
    sizes: tuple[tuple[int, int], ...] = ((128, 128), (160, 96))
    others: tuple[tuple[tuple[int, int], tuple[int, int]], ...] = OTHERS
    attention: tuple[str, ...] = ("auto", "merged", "torch", "stock")
    ropes: tuple[str, ...] = ("scaled", "phase_aligned")
    parts: tuple[str, ...] = ("transformer", "text_encoder")
    rotations: Callable[[Any, Callable[[], Any]], torch.Tensor] | None = field(default_factory=lambda: rotations)
    masked: bool = False
    sends_values: bool = False

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
            return adapter, adapter.prepare(pipe, call, SpecEditConfig(attention=attention))


class Shuffled:
    """A mixed layout whose tokens are listed in another order."""

    is_mixed, is_coarse, is_fine, unit = True, False, False, 1

    def __init__(self, layout: MixedLayout, order: torch.Tensor, move: bool = True):
        self.grid, self.tokens, self.area = layout.grid, layout.tokens, layout.area[order]
        self.picture = layout.picture
        self.positions = layout.positions[order] if move else layout.positions

    @property
    def layouts(self):
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


def inside(pipe, run, but=()):
    """A module with weights in the middle of those that the transformer calls in `run()`, none of `but`."""
    calls = []
    handles = [
        module.register_forward_pre_hook(lambda module, args: calls.append(module))
        for module in pipe.transformer.modules()
        if next(module.parameters(recurse=False), None) is not None and module not in but
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    once = list(dict.fromkeys(calls))
    return once[len(once) // 2]


def mixed_layout(grid, share=0.4, seed=0):
    return MixedLayout(grid, torch.rand(grid.coarse().shape, generator=torch.Generator().manual_seed(seed)) < share)


def step_of(family, adapter, pipe, state, layout, config, sigma=0.5):
    """Calls the adapter on random tokens of a layout: what comes back takes `partial` and predicts for its `group`."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randn(state.batch, layout.tokens, state.noise.shape[2], generator=draw)
    run, group = Run(adapter, pipe, config, state), group_of(state, layout, tokens)

    @torch.no_grad()
    def predict(partial=None):
        return adapter.predict(run, group, sigma, partial)

    predict.group = group
    return predict


def group_of(state, layout, tokens, rows=None, reference=None, beside=None):
    """A group of all samples, or of some `rows`, with the references that a run has for the layout."""
    rows = list(range(state.batch)) if rows is None else rows
    beside = beside or state.beside(layout)
    reference = reference_on_layout(state.reference, beside)[rows] if reference is None else reference
    return LayoutGroup(rows, layout, reference, beside, tokens, [])


def layouts(grid):
    return [mixed_layout(grid), MixedLayout.all_coarse(grid), MixedLayout.all_fine(grid)]


def trace(pipe):
    """What an installation may change on a pipeline."""
    hooks = [vars(module).get("forward") for module in pipe.transformer.modules()]
    processors = [vars(module)["processor"] for module in pipe.transformer.modules() if "processor" in vars(module)]
    return type(pipe), processors, hooks


def rotations(pipe, run):
    """(tokens, D) complex: what the transformer's last call in `run()` rotated its tokens by, text included. The axis
    that tells images apart is left out. For transformers of diffusers with a `pos_embed` that has `axes_dim`."""
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
    positions = torch.cat([part.positions for part in beside.layouts])
    return (layout.positions[:, None] == positions).all(-1).nonzero()


def defining_module(pipe, method):
    """The module of the class that defines a pipeline's method, installed or not; "" where there is no such method."""
    owners = (base for base in stock_of(type(pipe)).__mro__ if method in vars(base))
    return next((owner.__module__ for owner in owners), "")
