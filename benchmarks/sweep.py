"""One setting at a time on the embedded editor: the curves behind the defaults.

    python -m benchmarks.sweep --cases 24 --textures 12 --size 256 --out benchmarks/results/sweep-256.json

The starting point, `BASE`, is `turbo` with restore="reference". Each row changes one field, "together" several;
those of `guidance_range` run under true guidance, which the others do without. A Qwen editor runs under guidance all
along, and its prompt holds a picture. Where the true mask of a task is known, `recall` is the share of its cells that
were found, `precision` the share of found cells that it covers. With --masks every call is given its task's own mask,
and the groups that only change how cells are found are left out. With --resume a run that was stopped, or that is to
see more tasks than before, goes on.
"""

import math

import torch
import torch.nn.functional as F

from benchmarks.scores import Scores, editor, options, some, tasks
from specedit import micro, report, uninstall
from specedit.api.installing import install

# Spelled out, so that a default that follows a curve does not move its starting point.
BASE = {"preset": "turbo", "restore": "reference", "draft_steps": 8, "boundaries": (0.7, 0.55)}
GRID: dict[str, list[dict]] = {
    "base": [{}],
    "restore": [{"restore": "full"}, {"restore": "pixels"}],
    "locked": [{"locked": "cached"}, {"locked": "reference"}],
    "reference_keep": [{"reference_keep": share} for share in (0.15, 0.5)],
    "boundaries": [{"boundaries": b} for b in ((0.9, 0.75), (0.8, 0.65), (0.6, 0.45), (0.5, 0.3), (0.4, 0.25))],
    "boundaries (full)": [{"restore": "full", "boundaries": b} for b in ((0.9, 0.75), (0.8, 0.65), (0.6, 0.45))],
    "verify_coarse": [{"verify_coarse": False}],
    "threshold (full)": [{"verify_at": "full", "threshold": t} for t in (0.2, 0.35, 0.5, 0.75, 1.0)],
    "threshold (draft)": [{"threshold": t} for t in (0.1, 0.35, 0.5, 0.75, 1.0)],
    "dilation": [{"dilation": d} for d in (0, 2)],
    "uniform_stride": [{"uniform_stride": k} for k in (0, 2, 4, 6)],
    "uniform_stride (full)": [{"restore": "full", "uniform_stride": 0}],
    "key_bias": [{"key_bias": "none"}],
    "rope": [{"rope": "phase_aligned"}],
    "draft_steps": [{"draft_steps": n} for n in (0, 1, 2, 4, 6, 12)],
    "draft_steps (full)": [{"restore": "full", "draft_steps": n} for n in (0, 1, 2, 4)],
    "draft_scale": [{"draft_scale": 2}],
    "selector": [{"selector": s} for s in ("edges", "variance", "uniform")],
    "reference_refresh": [{"reference_refresh": r} for r in (2, 4)],
    # An empty negative prompt; the first row guides every step, as the baseline of the others.
    "guidance_range": [
        {"true_cfg_scale": 2.5} | ({"guidance_range": r} if r else {})
        for r in (None, (0.0, 0.9), (0.2, 1.0), (0.2, 0.9), (0.4, 0.8))
    ],
    "forecast": [{"forecast": name} for name in ("reuse", "taylor", "freqca")],
    "steps": [{"steps": s} for s in ((3, 2, 4), (4, 2, 3), (0, 4, 5), (4, 0, 5), (0, 0, 9))],
    "together": [
        {"draft_steps": 0, "locked": "cached"},
        {"draft_steps": 0, "reference_refresh": 4},
        {"draft_steps": 0, "boundaries": (0.8, 0.65)},
        {"locked": "cached", "boundaries": (0.8, 0.65)},
        {"draft_steps": 0, "locked": "cached", "boundaries": (0.8, 0.65), "uniform_stride": 0},
        {"draft_steps": 0, "threshold": 0.1},
        {"restore": "full", "draft_steps": 0, "boundaries": (0.8, 0.65)},
    ],
    "short coarse stage": [
        {"locked": "cached", "boundaries": (0.8, 0.65), "uniform_stride": 0, "steps": steps, "draft_steps": draft}
        for steps, drafts in (((0, 4, 5), (8, 4, 2, 1)), ((1, 3, 5), (0, 2)))
        for draft in drafts
    ],
}

QWEN: dict[str, list[dict]] = {
    "draft_condition": [{"draft_condition": "small"}],
    "guidance_range": [{"guidance_range": r} for r in ((0.0, 0.9), (0.2, 1.0), (0.2, 0.9), (0.4, 0.8))],
}


FINDING = (  # groups that change nothing where the caller gives the mask
    "verify_coarse", "threshold (full)", "threshold (draft)", "dilation", "draft_steps", "draft_steps (full)",
    "draft_scale", "selector", "draft_condition", "together", "short coarse stage",
)  # fmt: skip


def grid(model: str, masks: bool = False) -> dict[str, list[dict]]:
    """The settings to try on the embedded editor `model`, by group. masks: whether the caller gives them."""
    every = GRID | QWEN if model == "qwen" else GRID
    return {group: changes for group, changes in every.items() if not (masks and group in FINDING)}


def agreement(pipe, case) -> dict[str, float]:
    """Recall and precision of the detected cells against the task's mask; nan where the run had nothing to find."""
    if (mask := report(pipe).edit_mask) is None:
        return dict(recall=math.nan, precision=math.nan)
    found = mask[0].float()
    true = F.adaptive_max_pool2d(torch.from_numpy(case.mask)[None, None].float(), found.shape)[0, 0]
    both = float((found * true).sum())
    return dict(recall=both / max(1.0, float(true.sum())), precision=both / max(1.0, float(found.sum())))


def found(pipe, case, **call) -> dict[str, float]:
    """The scores of one task, and how the cells that were found agree with its mask."""
    return micro.evaluate(pipe, [case], **call)["cases"][0] | agreement(pipe, case)


def variants(groups: dict[str, list[dict]]) -> dict[str, dict]:
    """Group and change by name."""
    return {
        ", ".join(f"{field}={value}" for field, value in change.items()) or "base": dict(group=group, change=change)
        for group, changes in groups.items()
        for change in changes
    }


def score(
    scores: Scores, pipe, name: str, todo: list[micro.scenes.Case], group: str, change: dict, masks: bool = False
) -> None:
    """Score one variant on the given tasks. masks: whether its mask goes with every call."""
    settings = {**BASE, **change}
    scale = settings.pop("true_cfg_scale", None)
    call = {} if scale is None else {"negative_prompt": "", "true_cfg_scale": scale}
    install(pipe, settings.pop("preset"), **settings)
    scored = [found(pipe, case, **call, **({"edit_mask": case.mask} if masks else {})) for case in todo]
    scores.add(pipe, name, scored, group=group, change={field: str(value) for field, value in change.items()})
    uninstall(pipe)


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, cases=24)
    parser.add_argument("--masks", action="store_true", help="give every call the task's own mask")
    args = parser.parse_args(arguments)
    chosen = variants(some(grid(args.model, args.masks), args.only))
    cases = tasks(args, first=10_000)  # not those of quality.py
    of, switches = ({"masks": True}, " --masks") if args.masks else ({}, "")
    scores = Scores.asked("sweep", args, cases, of, switches, base=BASE)
    pipe = editor(args.model)
    for name, todo in scores.turns(chosen):
        score(scores, pipe, name, todo, **chosen[name], masks=args.masks)
    scores.write()  # also where a file of before lacks only the starting point's fields


if __name__ == "__main__":
    main()
