"""Keys and values of some tokens, kept between steps: they change little while the others are denoised."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from .base import PromptBoundCache

LOCKED_RESET = 9  # steps from one reset to the next: SpotEdit's, at steps 13, 22 and 31


@dataclass(eq=False)
class KVCache:
    """Keys and values (b, S, heads, dim) of every attention module of one branch."""

    entries: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    text_tokens: int = 0  # rows before the target's

    @property
    def memory(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.entries.values() for t in pair)

    def keep(self, rows: int) -> None:
        """Forget what lies beyond the first `rows` of S: packed sequences of a guidance branch that has left."""
        for module, (k, v) in self.entries.items():
            if k.shape[1] > rows:
                self.entries[module] = (k[:, :rows].contiguous(), v[:, :rows].contiguous())


@dataclass(frozen=True, eq=False)
class Fusion:
    """Kept keys and values of some target tokens, moved towards those of reference tokens before they are attended to:
    weight * kept + (1 - weight) * reference. They are rotated to the target token's position first.

    target, reference: (b, f) int64, tokens of the target, and for each one of the references' (all of them in a row).
    """

    target: Tensor
    reference: Tensor
    weight: float


@dataclass(frozen=True, eq=False)
class PartialForward:
    """How one branch of a step is computed; the store is filled, or the rows of what is computed replaced in it.

    All tokens (index None), the text and the target tokens `index` (b, m), or all target tokens without the text
    (`target`). fusion: with an index, what becomes of kept target tokens.
    """

    store: KVCache
    index: Tensor | None = None
    target: bool = False
    fusion: Fusion | None = None

    @property
    def partial(self) -> bool:
        return self.target or self.index is not None


class TokenKVCache(PromptBoundCache):
    """Keys and values of all tokens of one part of a batch, for steps that compute some of the target's.

    A whole step fills it. A step over some tokens replaces theirs, and those of the text, and attends to all. Where a
    callback has replaced the prompt, what is kept is `stale`.
    """

    def __init__(self) -> None:
        self.stores: list[KVCache] = []
        self.stale = True

    def reset(self) -> None:
        self.stale = True

    @property
    def memory(self) -> int:
        """Bytes held by all branches."""
        return sum(store.memory for store in self.stores)

    def whole(self, branches: int) -> list[PartialForward]:
        """A step over all tokens that fills the cache, under so many guidance branches."""
        self.stores, self.stale = [KVCache() for _ in range(branches)], False
        return [PartialForward(store) for store in self.stores]

    def some(self, index: Tensor, fusion: Fusion | None = None) -> list[PartialForward]:
        """A step over the text and the target tokens `index` (b, m)."""
        return [PartialForward(store, index, fusion=fusion) for store in self.stores]


class ReferenceKVCache(TokenKVCache):
    """What one part of a batch keeps in one stage, refreshed by a whole step now and then.

    A refresh runs the transformer over text, target and reference, and has every attention module keep its keys and
    values. The steps between run it over the target's tokens alone, which replace theirs and attend to all of them.
    Exact where text and reference do not change from step to step, as in a model that never lets them see the target
    and modulates them alike at every sigma; an approximation in any other.

    Args:
        every: steps from one refresh to the next.
    """

    def __init__(self, every: int):
        super().__init__()
        self.every = every
        self.last = 0  # the latest refresh

    def calls(self, step: int, branches: int) -> list[PartialForward]:
        """How `step` of a stage is computed under so many guidance branches.

        A branch that joins brings a refresh; of one that leaves nothing is kept.
        """
        if self.stale or step - self.last >= self.every or branches > len(self.stores):
            self.last = step
            return self.whole(branches)
        self.stores = self.stores[:branches]
        return self.between()

    def between(self) -> list[PartialForward]:
        """A step between two refreshes."""
        return [PartialForward(store, target=True) for store in self.stores]


class LockedKVCache(ReferenceKVCache):
    """What one part of a batch keeps of its locked cells and of the reference, in one stage.

    The steps between two refreshes compute the text and the target tokens `index` (b, m), the same in every sample.
    """

    def __init__(self, index: Tensor):
        super().__init__(LOCKED_RESET)
        self.index = index

    def between(self) -> list[PartialForward]:
        return self.some(self.index)
