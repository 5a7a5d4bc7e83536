"""Keys and values of some tokens, kept between steps: they change little while the others are denoised."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

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
class PartialForward:
    """How one branch of a step is computed; the store is filled, or the rows of what is computed replaced in it.

    All tokens (index None), the text and the target tokens `index` (b, m), or all target tokens without the text
    (`target`).
    """

    store: KVCache
    index: Tensor | None = None
    target: bool = False

    @property
    def partial(self) -> bool:
        return self.target or self.index is not None


class ReferenceKVCache(PromptBoundCache):
    """What one part of a batch keeps in one stage.

    A refresh runs the transformer over text, target and reference, and has every attention module keep its keys and
    values. The steps between run it over the target's tokens alone, which replace theirs and attend to all of them.
    Exact where text and reference do not change from step to step, as in a model that never lets them see the target
    and modulates them alike at every sigma; an approximation in any other.

    Args:
        every: steps from one refresh to the next.
    """

    def __init__(self, every: int):
        self.every = every
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.stores: list[KVCache] = []
        self.last: int | None = None  # the latest refresh

    @property
    def memory(self) -> int:
        """Bytes held by all branches."""
        return sum(store.memory for store in self.stores)

    def calls(self, step: int, branches: int) -> list[PartialForward]:
        """How `step` of a stage is computed under so many guidance branches.

        A branch that joins brings a refresh; of one that leaves nothing is kept.
        """
        fresh = self.last is None or step - self.last >= self.every or branches > len(self.stores)
        if fresh:
            self.stores, self.last = [KVCache() for _ in range(branches)], step
        self.stores = self.stores[:branches]
        return [PartialForward(store, target=not fresh) for store in self.stores]


class LockedKVCache(ReferenceKVCache):
    """What one part of a batch keeps of its locked cells and of the reference, in one stage.

    A reset runs the transformer over all tokens. The steps between run it over the text and the target tokens `index`
    (b, m), the same in every sample, which replace their keys and values and attend to all of them.
    """

    def __init__(self, index: Tensor):
        super().__init__(LOCKED_RESET)
        self.index = index

    def calls(self, step: int, branches: int) -> list[PartialForward]:
        return [
            replace(call, index=self.index, target=False) if call.target else call
            for call in super().calls(step, branches)
        ]
