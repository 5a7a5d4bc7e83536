"""The ablations that Fresco's paper reports, on the embedded editor.

    python -m benchmarks.ablations --cases 64 --size 256 --out benchmarks/results/ablations-256.json

Each row changes one option of the method. All take turns on every few tasks in one run. --resume goes on with the file,
also with more tasks.
"""

from typing import Any

from benchmarks.methods import score
from benchmarks.scores import Scores, editor, options, some, tasks
from specedit.methods import Fresco

CHANGES: dict[str, dict[str, Any]] = {
    "full": {},
    "interpolated": {"expansion": "interpolated"},
    "fresh noise": {"noise": "fresh"},
    "edges": {"select": "edges"},
    "random": {"select": "random"},
}


def variants() -> dict[str, dict[str, Any]]:
    """Settings by name, as those of `benchmarks.methods`."""
    return {name: {"group": "method", "fields": {"method": Fresco(**change)}} for name, change in CHANGES.items()}


def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__).parse_args(arguments)
    chosen = some(variants(), args.only)
    scores = Scores.asked("ablations", args, tasks(args))
    pipe = editor(args.model)
    for name, todo in scores.turns(chosen):
        score(scores, pipe, name, todo, chosen[name])


if __name__ == "__main__":
    main()
