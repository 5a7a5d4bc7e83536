"""Predict a batch without running it: operations of every row, and a bound of its time."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import pipelines
from ..config import SpecEditConfig
from ..cost.flops import plan
from ..cost.roofline import GPUS, predict_roofline
from ..cost.tables import MODELS, TOKEN_PIXELS, ModelCost
from ..models.registry import released_models
from ..pipelines.loading import INDEX
from ..released import Released
from .jobs import Job
from .results import FAILED, Result
from .settings import Settings
from .worker import line

Kinds = Mapping[str, tuple[Released, ...]]
WORDS = 32  # tokens of a sentence that an embedded editor reads


@dataclass(frozen=True)
class Cost:
    """What a model's edits cost. name: of the released model in `MODELS`, None of an embedded editor.

    guided_by_prompt: as of the released model.
    """

    cost: ModelCost
    name: str | None = None
    guided_by_prompt: bool = False

    def of(self, settings: Settings) -> ModelCost:
        """The cost with as many guidance passes as the settings run."""
        if not self.guided_by_prompt:
            return self.cost
        return dataclasses.replace(self.cost, passes=1 + ("negative_prompt" in settings.guidance))


@dataclass(frozen=True)
class Group:
    """Rows of one size, configuration and edited share: their count, and what each of them takes."""

    rows: int
    size: tuple[int, int]
    config: SpecEditConfig
    edited: float
    flops: float
    flops_ratio: float
    seconds: float


def cost_of(model: str | None) -> Cost:
    """The cost of the pipeline that `specedit edit --model` would load; weights are not read.

    Raises:
        ValueError: a pipeline whose cost is not known.
    """
    folder = _folder(model)
    if model is None or model in pipelines.EDITORS or pipelines.loading.embedded_editor(str(model)):
        assert folder is not None
        kontext = _read(folder / INDEX).get("_class_name") == "FluxKontextPipeline"
        steps = MODELS["flux-kontext" if kontext else "qwen-image-edit"].default_steps
        return Cost(_cost(folder, ModelCost({}, WORDS, 1 if kontext else 2, default_steps=steps)))
    kinds = released_models()
    found = _in_folder(kinds, folder) if folder else _on_hub(kinds, model)
    if found is None:
        raise ValueError(f"--dry-run: expected a model whose cost is known, one of {', '.join(kinds)}, got {model}")
    usual = MODELS[found.cost]
    return Cost(_cost(folder, usual) if folder else usual, found.cost, found.guided_by_prompt)


def predict(
    jobs: Iterable[Job], cost: Cost, *, edited: float, gpu: str | None = None, rate: float | None = None
) -> tuple[list[Group], list[Result]]:
    """Operations and seconds of jobs, in groups of rows that take the same, and results of rows that cannot run.

    Args:
        edited: share of the picture that is edited where no mask says it.
        gpu: a name of `specedit.cost.roofline.GPUS`; seconds are then its roofline's.
        rate: operations a second, for seconds without `gpu`.

    Raises:
        ValueError: naming the argument.
    """
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"--gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    counted: dict[tuple[Any, ...], int] = {}
    failed = []
    for job in jobs:
        settings = job.settings
        size = job.layout or (1024, 1024)
        try:
            share = edited if job.mask is None else round(_share(job.mask, size), 2)
        except (OSError, TypeError, ValueError) as error:
            failed.append(Result(job.id, job.row, status=FAILED, error=line(error)))
            continue
        key = (size, settings.running, share, job.mask is None, "negative_prompt" in settings.guidance)
        counted[key] = counted.get(key, 0) + 1
    one = functools.partial(_group, cost, gpu, rate)
    return [one(*key, rows=rows) for key, rows in counted.items()], failed


def _group(
    cost: Cost, gpu: str | None, rate: float | None, size: tuple[int, int], config: SpecEditConfig, edited: float,
    drafts: bool, guided: bool, *, rows: int,
) -> Group:  # fmt: skip
    width, height = size
    model = cost.of(Settings(config, guidance={"negative_prompt": ""} if guided else {}))
    planned = plan(config, model, height, width, edited, drafts=drafts)
    flops = planned["flops"]
    if gpu is not None and cost.name is not None:  # what the table's model takes, in proportion
        usual = plan(config, cost.name, height, width, edited)["flops"]
        seconds = predict_roofline(config, cost.name, height, width, edited, gpu)["seconds"] * flops / usual
    else:
        seconds = flops / (rate or (GPUS[gpu].flops if gpu else float("nan")))
    return Group(rows, size, config, edited, flops, planned["flops_ratio"], seconds)


def rate_here(seconds: float = 0.2) -> float:
    """Operations a second of large matrix products on this machine: no edit runs faster."""
    import torch

    cuda = torch.cuda.is_available()
    device, dtype, side = ("cuda", torch.bfloat16, 8192) if cuda else ("cpu", torch.float32, 1024)
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # reading a value waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _share(mask: str | bytes, size: tuple[int, int]) -> float:
    """Share of the coarse cells that a mask edits."""
    from ..io import pictures
    from ..layout import TokenGrid, cells_touched
    from ..method import masks

    file, name = (io.BytesIO(mask), "mask") if isinstance(mask, bytes) else (mask, mask)
    pixels = masks.read(pictures.read_mask(file, name)[0])[0]
    grid = TokenGrid(size[1] // TOKEN_PIXELS, size[0] // TOKEN_PIXELS)
    return cells_touched(pixels[None].float(), grid).float().mean().item()


def _folder(model: str | None) -> Path | None:
    """The folder that holds the pipeline, None of one on the hub."""
    if model is None or model in pipelines.EDITORS:
        from ..micro.loading import WEIGHTS

        return WEIGHTS / (model or pipelines.EDITORS[0])
    path = Path(model).expanduser()
    return path if path.is_dir() else None


def _in_folder(kinds: Kinds, folder: Path) -> Released | None:
    """The model of a pipeline in a folder: of several with its class, the one with as many layers."""
    models = kinds.get(str(_read(folder / INDEX).get("_class_name")), ())
    layers = _read(folder / "transformer" / "config.json").get("num_layers")
    return next((one for one in models if MODELS[one.cost].config["num_layers"] == layers), next(iter(models), None))


def _on_hub(kinds: Kinds, model: str) -> Released | None:
    """The model of a hub id: of those with the class in its index, or of all if that cannot be read, by its name."""
    from diffusers import DiffusionPipeline

    try:
        models = kinds.get(str(DiffusionPipeline.load_config(model)["_class_name"]), ())
        usual = next(iter(models), None)
    except Exception:
        models, usual = tuple(one for each in kinds.values() for one in each), None
    named = [one for one in models if all(word in model.lower() for word in one.hub)]
    return max(named, key=lambda one: len("".join(one.hub)), default=usual)


def _cost(folder: Path, usual: ModelCost) -> ModelCost:
    """`usual` with the sizes and the schedule in a pipeline's folder."""
    found = _read(folder / "transformer" / "config.json").items()
    transformer = {**usual.config, **{name: value for name, value in found if _is_number(value)}}
    scheduler = _read(folder / "scheduler" / "scheduler_config.json") or usual.scheduler
    return dataclasses.replace(usual, config=transformer, scheduler=scheduler)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read(file: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
