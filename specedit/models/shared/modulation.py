"""Scale, shift and gate of all timesteps at once (modulation="once"), from weights that make nothing else.

A transformer's adaptive norms read large weights in every step, and make of the timestep (and of the pooled prompt and
the guidance scale) a few vectors. Those of many timesteps are one matrix product each. They are made inside the
transformer's own forward pass, by its own modules, so LoRA scales, autocast and offloading act on them as usual.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...hold import Hold
from ...method.adapter import LayoutGroup, Run
from ..attention import compiled

_LOCK = threading.RLock()  # while hooks come and go; never during a run


@dataclass(frozen=True)
class ModulationLayers:
    """Where a transformer makes its modulation.

    embedder: the module that makes an embedding (n, D) of timesteps (n,) and whatever else it takes, by position.
    layers: linear layers of the transformer, and blocks: those of every block of a list, by the list's name; each takes
    silu of the embedding. factor: of the embedder's timesteps to sigmas. per_sample: whether the embedding differs from
    sample to sample, as with a pooled prompt.
    """

    embedder: str
    layers: tuple[str, ...] = ("norm_out.linear",)
    blocks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    factor: float = 1000.0
    per_sample: bool = False

    def find(self, transformer: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """Every layer, with the block or transformer that calls it. AttributeError where one is missing."""
        found = [(transformer.get_submodule(name), transformer) for name in self.layers]
        for blocks, names in self.blocks.items():
            for block in getattr(transformer, blocks):
                found += [(block.get_submodule(name), block) for name in names]
        return found


def why_every_step(transformer: Any, layers: ModulationLayers) -> str | None:
    """Why every step computes this transformer's modulation (one phrase), or None."""
    if compiled.is_whole(transformer):
        return "the transformer is compiled, and its graph computes the modulation"
    try:
        embedder, found = transformer.get_submodule(layers.embedder), layers.find(transformer)
    except AttributeError:
        return f"{type(transformer).__name__} makes its modulation elsewhere"
    if any(getattr(owner, "_compiled_call_impl", None) is not None for _, owner in found):
        return "its blocks are compiled, and their graphs compute the modulation"
    for module in (embedder, *(layer for layer, _ in found)):
        if module._forward_hooks or module._forward_pre_hooks:
            return "hooks follow the layers that make the modulation"
    if any(_in_group(module) for pair in found for module in pair):
        return "its layers are offloaded in groups"
    if not all(_is_plain(layer) for layer, _ in found):
        return "the layers that make its modulation are quantised"
    return None


def _in_group(module: nn.Module) -> bool:
    return "group_offloading" in getattr(getattr(module, "_diffusers_hook", None), "hooks", ())


def _is_plain(layer: nn.Module) -> bool:
    """Whether a linear layer, below its LoRAs, computes each row by itself. Quantised ones may scale all rows alike."""
    layer = getattr(layer, "base_layer", layer)
    weight = getattr(layer, "weight", None)
    return type(layer) is nn.Linear and type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()


@dataclass(eq=False)
class Pass:
    """What one pass over the weights has made: of every hook (times, samples, out), and (1, out) of timestep 0 where
    the transformer asks for that too."""

    values: dict[Hook, Tensor]
    at_zero: dict[Hook, Tensor]

    @property
    def memory(self) -> int:
        each = (*self.values.values(), *self.at_zero.values())
        return sum(value.numel() * value.element_size() for value in each)


@dataclass(eq=False)
class Step:
    """One forward pass under way. missing: sigmas to compute first. batch: samples, which the embedder may be given
    more times than."""

    table: dict[float, tuple[Pass, int]]
    sigma: float
    missing: list[float]
    batch: int
    dtype: torch.dtype


class Modulation:
    """A run's modulation. It is computed when it is first asked for, of all sigmas known by then.

    Args:
        sigmas: known before the run; those of a stage are known when it begins.

    passes: over the weights. memory: bytes that are kept, until the run ends.
    """

    def __init__(self, layers: ModulationLayers, sigmas: Sequence[float]):
        self.layers, self.sigmas = layers, sigmas
        self.tables: dict[Any, dict[float, tuple[Pass, int]]] = {}
        self.hooks: list[Hook] = []  # the embedder's first
        self.step: Step | None = None
        self.is_viewed = True
        self.passes = self.memory = 0

    @contextmanager
    def at(self, run: Run, group: LayoutGroup, sigma: float, batch: int, prompt: Any) -> Iterator[None]:
        """As `at_step`."""
        table = self.tables.setdefault((prompt, *group.rows) if self.layers.per_sample else None, {})
        missing: list[float] = []
        if sigma not in table:
            before = self.sigmas if len(group.rows) == run.state.batch else ()
            missing = [one for one in dict.fromkeys((sigma, *group.sigmas[:-1], *before)) if one not in table]
        self.step = Step(table, sigma, missing, batch, run.state.conditioning.dtype)
        try:
            yield
        finally:
            self.step = None

    def fill(self, step: Step, timestep: Tensor, others: Sequence[Any]) -> None:
        """Compute a step's missing sigmas. timestep, others: what the embedder is given."""
        per_sample = self.layers.per_sample
        samples = step.batch if per_sample else 1
        # Rounded as adapters and transformers do it; filled on the device, because a copy would wait for it.
        times = torch.stack([timestep.new_full((), one * 1000, dtype=torch.float32) for one in step.missing])
        times = ((times.to(step.dtype) / 1000).to(timestep.dtype) * self.layers.factor).repeat_interleave(samples)
        count, zeros = len(step.missing), len(timestep) > step.batch
        if zeros:
            times = torch.cat([times, times.new_zeros(1)])

        def repeated(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim > 2 or len(value) != step.batch:
                return value  # of which only the dtype is read
            return value[:samples].repeat(count, *[1] * (value.ndim - 1))

        embedder, *hooks = self.hooks
        embedding = embedder.stock(times, *map(repeated, others))
        made = {embedder: embedding}
        active = F.silu(embedding)
        made |= {hook: hook.stock(active) for hook in hooks}
        end = count * samples
        values = {hook: value[:end].unflatten(0, (count, samples)) for hook, value in made.items()}
        done = Pass(values, {hook: value[end:] for hook, value in made.items()} if zeros else {})
        step.table.update({sigma: (done, i) for i, sigma in enumerate(step.missing)})
        step.missing = []
        self.passes += 1
        self.memory += done.memory

    def output(self, hook: Hook, step: Step, count: int) -> Tensor:
        """What a module gives in this step, (count, out): the samples', and beyond them those of timestep 0."""
        done, i = step.table[step.sigma]
        own = done.values[hook][i]
        own = own if len(own) == step.batch else own.expand(step.batch, -1)
        if count > step.batch:
            return torch.cat([own, done.at_zero[hook].expand(count - step.batch, -1)])
        return own if self.is_viewed else compiled.unviewed(own)  # of views, compiled blocks would make graphs anew


class Hook:
    """Replaces the `forward` of a module while runs of any thread ask for it. runs: by thread."""

    def __init__(self, module: nn.Module):
        self.module, self.stock = module, module.forward
        self.was_replaced = "forward" in vars(module)  # by another library, such as one that brings the weights
        self.runs: dict[int, Modulation] = {}

    def __call__(self, first: Any, *args: Any, **kwargs: Any) -> Any:
        run = self.runs.get(threading.get_ident())
        step = None if run is None else run.step
        if run is None or step is None:
            return self.stock(first, *args, **kwargs)
        if step.missing:  # the embedder is called before all others
            run.fill(step, first, args)
        return run.output(self, step, len(first))

    def remove(self) -> None:
        if vars(self.module).get("forward") is not self:
            return
        if self.was_replaced:
            self.module.forward = self.stock
        else:
            del self.module.forward


def at_step(run: Run, group: LayoutGroup, sigma: float, batch: int, prompt: Any = None) -> AbstractContextManager[None]:
    """Inside, the transformer runs one step of a group, with `batch` timesteps, under a prompt."""
    return nullcontext() if run.modulation is None else run.modulation.at(run, group, sigma, batch, prompt)


@contextmanager
def once(run: Run, layers: ModulationLayers, sigmas: Sequence[float]) -> Iterator[None]:
    """Inside, the run's forward passes take their modulation from `run.modulation`. Other threads' calls, and other
    calls of this one, compute their own; afterwards the modules are as they were."""
    thread, transformer = threading.get_ident(), run.pipe.transformer
    modules = [transformer.get_submodule(layers.embedder), *(layer for layer, _ in layers.find(transformer))]
    kept = run.modulation = Modulation(layers, sigmas)
    kept.is_viewed = all(getattr(one, "_compiled_call_impl", None) is None for one in compiled.blocks(transformer))
    try:
        with Hold(_LOCK):
            for module in modules:
                if not isinstance(hook := vars(module).get("forward"), Hook):
                    module.forward = hook = Hook(module)
                hook.runs[thread] = kept
                kept.hooks.append(hook)
        yield
    finally:
        with Hold(_LOCK):
            for hook in kept.hooks:
                hook.runs.pop(thread, None)
                if not hook.runs:
                    hook.remove()
        kept.tables.clear()
        kept.hooks.clear()
