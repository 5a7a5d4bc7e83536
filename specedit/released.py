"""The released models of a family, as its adapter states them: one mapping for prediction and for tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Released:
    """A released model.

    cost: its name in `specedit.cost.tables.MODELS`. title: for tables. hub: words in its hub ids, lower case; of
    several models, the one with the longest words is meant. guided_by_prompt: its second guidance pass runs with a
    negative prompt only.
    """

    cost: str
    title: str
    hub: tuple[str, ...]
    guided_by_prompt: bool = False
