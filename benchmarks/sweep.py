"""One setting at a time on the embedded editor: the curves behind the defaults.

    python -m benchmarks.sweep --cases 24 --size 256 --out benchmarks/results/sweep-256.json

The starting point is `turbo` with restore="reference" and "full"; each row changes one field (those of `guidance_range`
run under true guidance, which the others do without). Where the true mask of a task is known, `recall` is the share of
its cells that were found, `precision` the share of found cells that it covers.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from benchmarks.scores import fingerprint
from specedit import install, micro, report, results, uninstall
from specedit.micro.load import WEIGHTS

BASE = {"preset": "turbo", "restore": "reference"}
GRID: dict[str, list[dict]] = {
    "base": [{}],
    "restore": [{"restore": "full"}],
    "boundaries": [{"boundaries": b} for b in ((0.9, 0.75), (0.8, 0.65), (0.6, 0.45), (0.5, 0.3), (0.4, 0.25))],
    "second_look": [{"second_look": False}],
    "threshold (full)": [{"verify_at": "full", "threshold": t} for t in (0.2, 0.35, 0.5, 0.75, 1.0)],
    "threshold (draft)": [{"threshold": t} for t in (0.1, 0.35, 0.5, 0.75, 1.0)],
    "dilation": [{"dilation": d} for d in (0, 2)],
    "uniform_stride": [{"uniform_stride": k} for k in (0, 2, 4, 6)],
    "key_bias": [{"key_bias": "none"}],
    "rope": [{"rope": "phase_aligned"}],
    "couple_noise": [{"couple_noise": True}],
    "draft_steps": [{"draft_steps": n} for n in (2, 4, 6, 12)],
    "draft_scale": [{"draft_scale": 2}],
    "selector": [{"selector": s} for s in ("edges", "variance", "uniform")],
    "reference_refresh": [{"reference_refresh": r} for r in (2, 4)],
    # A negative prompt of no words; the first row is guidance at every step, which the others are compared with.
    "guidance_range": [
        {"true_cfg_scale": 2.5} | ({"guidance_range": r} if r else {})
        for r in (None, (0.0, 0.9), (0.2, 1.0), (0.2, 0.9), (0.4, 0.8))
    ],
    "steps": [{"steps": s} for s in ((3, 2, 4), (4, 2, 3), (0, 4, 5), (4, 0, 5), (0, 0, 9))],
}


def agreement(pipe, case) -> dict[str, float]:
    """Recall and precision of the found cells against the task's true mask."""
    found = report(pipe).edit_mask[0].float()
    true = F.adaptive_max_pool2d(torch.from_numpy(case.mask)[None, None].float(), found.shape)[0, 0]
    both = float((found * true).sum())
    return dict(recall=both / max(1.0, float(true.sum())), precision=both / max(1.0, float(found.sum())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="kontext", help="the embedded editor: kontext or qwen")
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(GRID))
    args = parser.parse_args()
    pipe = micro.load(args.model, device="cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    cases = [micro.scenes.sample(10_000 + i, args.size) for i in range(args.cases)]  # not those of quality.py
    command = f"python -m benchmarks.sweep --model {args.model} --cases {args.cases} --size {args.size}"
    rows, of = [], dict(model=args.model, size=args.size, weights=fingerprint(WEIGHTS / args.model))
    todo = [
        (name, change) for name, changes in GRID.items() if args.only is None or name in args.only for change in changes
    ]
    for name, change in tqdm(todo, file=sys.stderr):
        settings = {**BASE, **change}
        preset = settings.pop("preset")
        scale = settings.pop("true_cfg_scale", None)
        call = {} if scale is None else {"negative_prompt": "", "true_cfg_scale": scale}
        install(pipe, preset, **settings)
        scored = []
        for case in cases:
            one = micro.evaluate(pipe, [case], **call)["cases"][0]
            scored.append({**one, **agreement(pipe, case)})
        uninstall(pipe)
        mean = micro.mean(scored)
        rows.append(dict(group=name, change={k: str(v) for k, v in change.items()}, mean=mean))
        results.write(args.out, command, rows, of=of)
        short = {
            k: round(mean[k], 3) for k in ("success", "edit_psnr", "keep_psnr", "flops_ratio", "recall", "precision")
        }
        print(name, change, short, flush=True)


if __name__ == "__main__":
    main()
