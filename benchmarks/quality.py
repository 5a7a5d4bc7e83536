"""Quality against cost on the embedded editor: stock at several step counts, every preset, both restores.

    python -m benchmarks.quality --cases 64 --size 512 --out benchmarks/results/quality-512.json

Every variant edits the same unseen tasks with the same seeds. With --resume a run that was stopped, or
that is to see more tasks, goes on where the file ends.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.scores import Scores, fingerprint
from specedit import install, micro, uninstall
from specedit.micro.load import WEIGHTS

PRESETS = ("quality", "balanced", "fast", "turbo")


def variants(names: list[str] | None) -> dict[str, dict]:
    """Name to {"steps": n} for stock and {"preset": ..., fields} for SpecEdit."""
    every: dict[str, dict] = {f"stock-{n}": {"steps": n} for n in (50, 28, 10)}
    for preset in PRESETS:
        for restore in ("full", "reference"):
            every[f"{preset}-{restore}"] = {"preset": preset, "restore": restore}
    if names is None:
        return every
    unknown = set(names) - set(every)
    if unknown:
        raise SystemExit(f"--only: expected some of {', '.join(every)}, got {', '.join(sorted(unknown))}")
    return {name: every[name] for name in names}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="kontext", help="the embedded editor: kontext or qwen")
    parser.add_argument("--cases", type=int, default=64)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(arguments)
    cases = [micro.scenes.sample(seed, args.size) for seed in range(args.cases)]
    weights = fingerprint(WEIGHTS / args.model)
    command = f"python -m benchmarks.quality --model {args.model} --cases {args.cases} --size {args.size}"
    of = dict(model=args.model, size=args.size, weights=weights)
    scores = Scores(args.out, command, cases, of, args.resume)
    pipe = micro.load(args.model, device="cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    chosen = variants(args.only)
    for name, todo in scores.turns(chosen):
        settings = chosen[name]
        if "preset" in settings:
            install(pipe, settings["preset"], restore=settings["restore"])
        scores.score(pipe, name, todo, settings.get("steps"), size=args.size, **settings)
        uninstall(pipe)


if __name__ == "__main__":
    main()
