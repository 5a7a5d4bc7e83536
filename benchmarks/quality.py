"""Quality against cost on the embedded editor: stock at several step counts, every preset, both restores.

    python -m benchmarks.quality --cases 64 --size 512 --out benchmarks/results/quality-512.json

Every variant edits the same unseen tasks with the same seeds: --cases of them with one right answer, and --textures of
the kind with many, by default a quarter as many. --resume continues the run in the file, also with more
tasks.
"""

from benchmarks.methods import STOCK, preset_rows
from benchmarks.scores import Scores, editor, options, some, tasks
from specedit import uninstall
from specedit.api.installing import install


def variants() -> dict[str, dict]:
    """Settings by name: {"steps": n} for stock, {"preset": ..., fields} for SpecEdit."""
    every: dict[str, dict] = {f"stock-{n}": {"steps": n} for n in STOCK}
    for name, (preset, restore) in preset_rows().items():
        every[name] = {"preset": preset, "restore": restore}
    return every


def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__).parse_args(arguments)
    chosen = some(variants(), args.only)
    scores = Scores.asked("quality", args, tasks(args))
    pipe = editor(args.model)
    for name, todo in scores.turns(chosen):
        settings = chosen[name]
        if "preset" in settings:
            install(pipe, settings["preset"], restore=settings["restore"])
        scores.score(pipe, name, todo, settings.get("steps"), size=args.size, **settings)
        uninstall(pipe)


if __name__ == "__main__":
    main()
