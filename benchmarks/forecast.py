"""Temporal caches alone and with SpecEdit, on the embedded editor.

    python -m benchmarks.forecast --cases 64 --size 512 --out benchmarks/results/forecast-512.json

Variants: stock with 50 steps; every cache alone at N = 4, 6, 9 (50 steps, nothing spatial); SpecEdit alone; SpecEdit
with taylor, hermite, foca and lesa; the step-distilled student at 8 and 6 steps, with and without SpecEdit, if `python
-m training.distil` has written its weights. All edit the same unseen tasks with the same seeds. --resume continues the
run in the file, also with more tasks. A variant without trained weights is reported and left out.
"""

from pathlib import Path
from typing import Any

from benchmarks.scores import Scores, editor, fitting, options, some, tasks, why_unfit
from specedit import SpecEditConfig, micro, uninstall
from specedit.api.installing import install
from specedit.config import STOCK_STEPS
from specedit.evaluation import results
from specedit.forecast import lesa
from specedit.micro.evaluation import stock_flops
from specedit.registry import forecasts

INTERVALS = (4, 6, 9)
PRESET = "balanced"
# For SpecEdit's short stages: the lowest order that extrapolates, and every third step full.
TOGETHER = {"taylor": {"forecast_order": 1}, "hermite": {"forecast_order": 1}, "foca": {}, "lesa": {}}


def variants(weights: Path | None, student: Path | None) -> dict[str, dict[str, Any]]:
    """Settings by name: stock "steps", or "install" arguments; "student" loads the LoRA first."""
    spec = {"config": PRESET}
    every: dict[str, dict[str, Any]] = {"stock-50": {"family": "stock", "steps": 50}}
    trained = {} if weights is None else {"forecast_weights": str(weights)}
    for name in forecasts:
        for interval in INTERVALS:
            fields = dict(steps=(0, 0, 50), forecast=name, forecast_interval=interval)
            fields |= trained if name == "lesa" else {}
            every[f"{name}-N{interval}"] = {"family": "cache", "install": fields}
    every["specedit"] = {"family": "specedit", "install": spec}
    for name, fields in TOGETHER.items():
        fields = spec | fields | dict(forecast=name, forecast_interval=3) | (trained if name == "lesa" else {})
        every[f"specedit-{name}"] = {"family": "specedit + cache", "install": fields}
    for steps in (8, 6):
        every[f"student-{steps}"] = {"family": "student", "steps": steps, "student": student}
        fields = {"config": f"lightning-{steps}", "restore": "reference"}
        every[f"student-{steps}-specedit"] = {"family": "student + specedit", "install": fields, "student": student}
    return every


def lacking(settings: dict[str, Any], pipe: Any) -> str | None:
    """Which trained weights a variant is missing, or None."""
    if "student" in settings and settings["student"] is None:
        return f"no student at {micro.STUDENT}; python -m training.distil trains one"
    return why_unfit(pipe, **settings["install"]) if "install" in settings else None


def run(scores: Scores, pipe: Any, name: str, todo: list[micro.scenes.Case], settings: dict[str, Any]) -> None:
    """Score one variant on the given tasks."""
    if settings.get("student") is not None:
        pipe.load_lora_weights(settings["student"])
    try:
        if "install" in settings:
            install(pipe, **settings["install"])
        scores.score(pipe, name, todo, settings.get("steps"), family=settings["family"])
    finally:
        uninstall(pipe)
        if settings.get("student") is not None:
            pipe.unload_lora_weights()


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, models=["kontext"])
    parser.add_argument("--lesa", type=Path, help="predictor to use instead of the packaged one")
    parser.add_argument("--student", type=Path, help="LoRA of the student instead of the packaged one")
    args = parser.parse_args(arguments)
    student = args.student or (micro.STUDENT if micro.STUDENT.exists() else None)
    every = some(variants(args.lesa, student), args.only)
    cases = tasks(args)
    pipe = editor(args.model)
    files = dict(student=student, lesa=args.lesa or lesa.packaged(pipe.transformer.config))
    of = {name: results.fingerprint(file) for name, file in files.items()}
    # Counted, so that ratios exist even if --only excludes the stock run.
    stock = sum(stock_flops(pipe, case, STOCK_STEPS) for case in cases) / len(cases)
    preset = SpecEditConfig.preset(PRESET).steps
    scores = Scores.asked("forecast", args, cases, of, preset=preset, stock_flops=stock)
    chosen = fitting(every, lambda settings: lacking(settings, pipe))
    for name, todo in scores.turns(chosen):
        run(scores, pipe, name, todo, chosen[name])


if __name__ == "__main__":
    main()
