"""Whether anything that a pipeline's encodings depend on has changed since they were made, besides the arguments."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .content import Unknown, digest

SIMPLE = (bool, int, float, str)
ADAPTER = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")  # of a layer with LoRA


@dataclass
class State:
    """The weights and settings of a pipeline at one moment. It keeps no weights alive.

    facts: what is compared. refs: weak references, without which the address of a freed tensor could be another's.
    objects: small parts that are compared by identity.
    """

    facts: list[Any] = field(default_factory=list)
    refs: list[Any] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)

    def same_as(self, other: State) -> bool:
        """Whether `other`, taken later, is of the same weights and settings."""
        gone = any(isinstance(ref, weakref.ref) and ref() is None for ref in self.refs)
        return not gone and self.facts == other.facts


def state_of(pipe: Any) -> State | None:
    """The state of a pipeline's components; None where a change of its weights could not be seen.

    Weights count by storage and version, which changes in place raise. Where offloading moves the storage, parameters
    count by identity and buffers by content. A LoRA counts by its weights, scales and switches, and once fused by the
    pipeline's record of it, because fusing raises no version.
    """
    state = State()
    state.facts.append(_settings(pipe))
    _add_object(state, vars(pipe).get("_merged_adapters"))
    for name, part in pipe.components.items():
        state.facts.append(name)
        if isinstance(part, nn.Module):
            if not _add_module(state, part):
                return None
        else:
            _add_object(state, part)
            state.facts.append({} if name == "scheduler" else _settings(part))
        _add_object(state, getattr(part, "_internal_dict", None))  # a diffusers configuration, replaced when changed
    return state


def _settings(part: Any) -> dict[str, Any]:
    """Public attributes that are plain values, such as `training`, `use_tiling` and `padding_side`."""
    items = getattr(part, "__dict__", {}).items()
    return {name: value for name, value in items if not name.startswith("_") and isinstance(value, SIMPLE)}


def _add_object(state: State, part: Any) -> None:
    state.objects.append(part)
    state.facts.append(id(part))


def _add_module(state: State, part: nn.Module) -> bool:
    """False where a change of the weights could not be seen."""
    state.facts.append(_settings(part))
    modules = list(part.modules())
    moves = any(map(_moves, modules))
    for module in modules:
        for tensor in _tensors(module):
            if tensor.is_meta:  # its values are with the hook that brings them
                _add_ref(state, getattr(module, "_hf_hook", module))
            elif tensor.is_inference():
                return False
            elif moves and not isinstance(tensor, nn.Parameter):
                state.facts.append(_content(tensor))
            else:
                _add_tensor(state, tensor, moves)
        if "merged_adapters" in vars(module) or "_active_adapter" in vars(module):
            state.facts += [repr(vars(module).get(name)) for name in ADAPTER]
    return True


def _moves(module: nn.Module) -> bool:
    """Whether a hook may bring its weights to a device and back. diffusers leaves empty registries behind."""
    return hasattr(module, "_hf_hook") or bool(getattr(getattr(module, "_diffusers_hook", None), "hooks", None))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Its own parameters and buffers."""
    for held in (module._parameters, module._buffers):
        yield from (tensor for tensor in held.values() if tensor is not None)


def _add_tensor(state: State, tensor: Tensor, moves: bool) -> None:
    state.facts += (tensor._version, tensor.dtype)
    if moves or type(tensor) not in (Tensor, nn.Parameter):  # other classes need not have a storage
        _add_ref(state, tensor)
        return
    storage = tensor.untyped_storage()
    state.refs.append(StorageWeakRef(storage))
    state.facts.append(storage._cdata)


def _content(buffer: Tensor) -> object:
    """Moving replaces buffers, which are small, by equal ones. What cannot be read counts as changed."""
    try:
        return digest(buffer.cpu())
    except Unknown:
        return object()


def _add_ref(state: State, part: Any) -> None:
    state.refs.append(weakref.ref(part))
    state.facts.append(id(part))
