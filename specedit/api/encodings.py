"""What an installed pipeline has encoded and found lately, for calls with `reuse_encodings`.

Everything is kept in CPU memory, bounded in bytes, by the content that it was made of. A change of weights, LoRAs or
settings ends it.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..hold import Hold
from .content import Unknown, digest
from .weights import State, state_of

MOST_BYTES = 256 * 2**20  # of one pipeline
PROMPTS, PICTURES, RENDITIONS, FINDINGS = "prompts", "pictures", "renditions", "findings"
# Arguments that do not change what a draft finds, but for its noise.
BESIDE_FINDING = {
    "generator", "latents", "output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
}  # fmt: skip


class Kept:
    """Nested tuples and lists of tensors by key, the least recently used of which go first."""

    def __init__(self, most: int):
        self.most, self.bytes = most, 0
        self._entries: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Any:
        """A copy, on the devices that it came from; None where there is nothing."""
        with Hold(self._lock):
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            value, _ = self._entries[key]
        return _returned(value)

    def put(self, key: bytes, value: Any) -> None:
        """Keep a copy, unless it is larger than all that may be kept."""
        size = _size(value)
        if size > self.most:
            return
        copy = _stored(value)
        with Hold(self._lock):
            _, old = self._entries.pop(key, (None, 0))
            self._entries[key] = copy, size
            self.bytes += size - old
            while self.bytes > self.most:
                _, (_, size) = self._entries.popitem(last=False)
                self.bytes -= size


class Reuse:
    """One call's view: what was kept before it, and what it reused. `pictures`: whether pictures are looked up."""

    def __init__(self, kept: Kept):
        self.kept, self.pictures = kept, True
        self.counts: Counter[str] = Counter()

    def encode(self, kind: str, encode: Any, arguments: dict[str, Any], device: torch.device | None) -> Any:
        """The result of `encode()`, or an equal one from before.

        arguments: all that it depends on besides the pipeline's state; its "generator" may be read, but what is drawn
        from one is not kept.
        """
        generator = arguments.get("generator")
        counted = arguments | {"generator": len(generator) if isinstance(generator, Sequence) else None}
        try:
            key = digest(kind, _numerics(device), device, counted)
        except Unknown:
            return encode()
        if (found := self.kept.get(key)) is not None:
            self.counts[kind] += 1
            return found
        before = _streams(generator)
        made = encode()
        drawn = any(not torch.equal(a, b) for a, b in zip(before, _streams(generator), strict=True))
        if not drawn and _is_kept(made):
            self.kept.put(key, made)
        return made

    def finding_key(self, arguments: dict[str, Any], config: Any, embeds: Tensor | None) -> bytes | None:
        """The key of a draft's finding; None where an argument cannot be read. embeds: of the prompt, which the
        pipeline may have rewritten."""
        given = {name: value for name, value in arguments.items() if name not in BESIDE_FINDING}
        try:
            return digest(FINDINGS, repr(config), given, embeds)
        except Unknown:
            return None

    def finding(self, key: bytes | None) -> Any:
        """What an earlier draft found, or None."""
        found = None if key is None else self.kept.get(key)
        if found is not None:
            self.counts[FINDINGS] += 1
        return found


class Encodings:
    """What one installed pipeline keeps; `reusing` opens it to a call."""

    def __init__(self, most: int = MOST_BYTES):
        self._most = most
        self._thread = threading.local()
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Let go of everything."""
        self.kept, self._state = Kept(self._most), State()

    @property
    def current(self) -> Reuse | None:
        """Of the call that runs in this thread, where it reuses anything."""
        found = getattr(self._thread, "reuse", None)
        return None if found is None else found()

    @contextmanager
    def reusing(self, pipe: Any) -> Iterator[Reuse | None]:
        """A call of this thread. None where changes of the weights cannot be seen, so that nothing is kept."""
        state = state_of(pipe)
        reuse, outer = None if state is None else Reuse(self._kept_for(state)), getattr(self._thread, "reuse", None)
        try:
            # Weak: it ends with the call's frames, even where Ctrl-C keeps them from taking it away.
            self._thread.reuse = None if reuse is None else weakref.ref(reuse)
            yield reuse
        finally:
            self._thread.reuse = outer

    def _kept_for(self, state: State) -> Kept:
        with Hold(self._lock):
            if not self._state.same_as(state):
                self.kept, self._state = Kept(self._most), state  # a call still running fills the old one
            return self.kept


def _numerics(device: torch.device | None) -> tuple[Any, ...]:
    """Settings of torch that decide how an encoder rounds."""
    kind = "cpu" if device is None else device.type
    return (
        torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),
    )  # fmt: skip


def _streams(generator: Any) -> list[Tensor]:
    """The states of the random streams that an encoder could draw from."""
    given = generator if isinstance(generator, Sequence) else [generator]
    states = [one.get_state() for one in given if one is not None] + [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else states


def _is_kept(value: Any) -> bool:
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return all(map(_is_kept, value))
    return value is None or type(value) is Tensor


def _size(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(map(_size, value))
    return 0 if value is None else value.numel() * value.element_size()


def _stored(value: Any) -> Any:
    """A copy in CPU memory: nobody's change in place reaches it, and no GPU memory is taken."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_stored, value))
    return None if value is None else (_copied(value.detach(), torch.device("cpu")), value.device)


def _returned(value: Any) -> Any:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.device):
        return _copied(*value)
    return None if value is None else type(value)(map(_returned, value))


def _copied(value: Tensor, device: torch.device) -> Tensor:
    return value.to(device, copy=True)
