"""Settings for 4 and 8 steps on the embedded editor: the curves behind the presets `few-4` and `few-8`.

    python -m benchmarks.few_steps --cases 24 --size 512 --out benchmarks/results/few-steps-512.json

The presets come first, under stock with as many steps and with as many as `STOCK` names. Each further row changes one
thing of a starting point. That of 4 steps is one coarse and three mixed ones, that of 8 one and seven. --resume goes on
with the file, also with more tasks.
"""

from __future__ import annotations

from typing import Any

from benchmarks.methods import STOCK
from benchmarks.scores import Scores, editor, options, some, tasks
from benchmarks.sweep import found
from specedit import micro, uninstall
from specedit.api.installing import install

BASE: dict[str, Any] = {"restore": "reference", "uniform_stride": 0}
STARTS: dict[int, dict[str, Any]] = {
    4: {"steps": (1, 2, 1), "draft_steps": 2},
    8: {"steps": (1, 5, 2), "draft_steps": 2},
}
OF_PRESETS: list[dict[str, Any]] = [{}, {"keep_pixels": True}, {"keep_pixels": True, "decode": "edited"}]
CHANGES: list[dict[str, Any]] = [
    {},
    *({"draft_steps": n} for n in (0, 1, 4)),
    *({"draft_steps": n, "reference_refresh": 8} for n in (0, 1, 2)),
    *({"boundaries": b} for b in ((0.9, 0.6), (0.8, 0.55), (0.6, 0.45))),
    *({"uniform_stride": n} for n in (3, 6)),
    *({"dilation": n} for n in (0, 2)),
    *({"locked": name} for name in ("cached", "reference")),
    *({"restore": name} for name in ("full", "pixels")),
    {"locked": "cached", "boundaries": (0.9, 0.6)},
    *({"locked": "cached", "draft_steps": n} for n in (0, 1)),
]
MORE: dict[int, list[dict[str, Any]]] = {
    4: [
        {"steps": (2, 1, 1)}, {"steps": (1, 0, 1), "draft_steps": 1}, {"steps": (0, 3, 1)},
        {"locked": "cached", "dilation": 2}, {"locked": "cached", "dilation": 2, "boundaries": (0.7, 0.55)},
    ],
    8: [
        {"steps": (2, 4, 2)}, {"steps": (3, 3, 2)}, {"steps": (0, 6, 2)}, {"reference_refresh": 3},
        *({"locked": "cached", "boundaries": (0.9, 0.75), "dilation": n} for n in (1, 2)),
        {"locked": "cached", "boundaries": (0.85, 0.7), "dilation": 2},
    ],
}  # fmt: skip


def variants() -> dict[str, dict[str, Any]]:
    """The arguments of `install` for every row by name; {"stock": n} for stock."""
    every: dict[str, dict[str, Any]] = {f"stock-{n}": {"stock": n} for n in STOCK}
    for count in STARTS:
        for change in OF_PRESETS:
            every[f"{count}: {in_words(f'few-{count}', change)}"] = {"config": f"few-{count}"} | change
    for count, start in STARTS.items():
        for change in CHANGES + MORE[count]:
            every[f"{count}: {in_words('', change) or 'start'}"] = BASE | start | change
    return every


def in_words(of: str, change: dict[str, Any]) -> str:
    """A setting and what is changed of it."""
    return ", ".join([*filter(None, [of]), *(f"{field}={value}" for field, value in change.items())])


def score(scores: Scores, pipe: Any, name: str, todo: list[micro.scenes.Case], fields: dict[str, Any]) -> None:
    """Run one row on some tasks."""
    if "stock" in fields:
        scores.score(pipe, name, todo, fields["stock"], fields=fields)
        return
    install(pipe, **fields)
    scores.add(
        pipe, name, [found(pipe, case) for case in todo], fields={field: str(value) for field, value in fields.items()}
    )
    uninstall(pipe)


def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__, cases=24).parse_args(arguments)
    chosen = some(variants(), args.only)
    scores = Scores.asked("few_steps", args, tasks(args, first=10_000))
    pipe = editor(args.model)
    for name, todo in scores.turns(chosen):
        score(scores, pipe, name, todo, chosen[name])


if __name__ == "__main__":
    main()
