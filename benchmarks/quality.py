"""Quality against cost on the embedded editor: stock at several step counts, every preset, both restores.

    python benchmarks/quality.py --cases 64 --size 512 --out benchmarks/results/quality-512.json

Every variant edits the same unseen tasks with the same seeds. Variants run one after another and the file is written
after each, so that a run that was stopped goes on where it was (--resume).
"""

import argparse
import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from specedit import install, micro, results, uninstall

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="kontext", help="the embedded editor: kontext or qwen")
    parser.add_argument("--cases", type=int, default=64)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["rows"] if args.resume and args.out.exists() else []
    done = {row["variant"] for row in rows}
    pipe = micro.load(args.model, device="cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    cases = [micro.scenes.sample(seed, args.size) for seed in range(args.cases)]
    command = f"python benchmarks/quality.py --model {args.model} --cases {args.cases} --size {args.size}"
    for name, settings in variants(args.only).items():
        if name in done:
            continue
        if "preset" in settings:
            install(pipe, settings["preset"], restore=settings["restore"])
        result = micro.evaluate(pipe, tqdm(cases, desc=name), settings.get("steps"))
        uninstall(pipe)
        # Edits of up to 15 % of the picture apart: that is where locking pays, and what the goals speak of.
        small = [r for r in result["cases"] if r.get("edit_fraction", 1) <= 0.15]
        rows.append(
            dict(variant=name, size=args.size, **settings, mean=result["mean"], kinds=result["kinds"],
                 small=micro.mean(small) if small else None, cases=result["cases"])
        )  # fmt: skip
        results.write(args.out, command, rows)
        mean = result["mean"]
        print(
            f"{name}: success {mean['success']:.1%}, edit {mean['edit_psnr']:.1f} dB, keep {mean['keep_psnr']:.1f} dB"
        )


if __name__ == "__main__":
    main()
