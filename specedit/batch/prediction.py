"""Predict a batch without running it: operations of every row, and a bound of its time."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import pipelines
from ..config import SpecEditConfig
from ..cost.flops import plan
from ..cost.roofline import GPUS, predict_roofline
from ..cost.tables import MODELS, TOKEN_PIXELS, ModelCost
from .jobs import Job
from .settings import Settings

WORDS = 32  # tokens of a sentence that an embedded editor reads
COSTS = {
    "FluxKontextPipeline": "flux-kontext", "QwenImageEditPipeline": "qwen-image-edit",
    "QwenImageEditPlusPipeline": "qwen-image-edit", "LongCatImageEditPipeline": "longcat-image-edit",
    "Flux2Pipeline": "flux2-dev", "Flux2KleinPipeline": "flux2-klein-9b", "Flux2KleinKVPipeline": "flux2-klein-9b-kv",
}  # fmt: skip
BY_NAME = {  # in hub ids, of pipelines whose index is not at hand
    "flux.1-kontext": "FluxKontextPipeline", "qwen-image-edit": "QwenImageEditPipeline",
    "longcat-image-edit": "LongCatImageEditPipeline", "flux.2-dev": "Flux2Pipeline",
    "flux.2-klein": "Flux2KleinPipeline",
}  # fmt: skip
SMALL = "flux2-klein-4b"
BY_PROMPT = ("flux-kontext", "qwen-image-edit")  # true guidance runs only with a negative prompt


@dataclass(frozen=True)
class Cost:
    """What a model's edits cost. name: of the released model in `MODELS`, None of an embedded editor."""

    cost: ModelCost
    name: str | None = None

    def of(self, settings: Settings) -> ModelCost:
        """The cost with as many guidance passes as the settings run."""
        if self.name not in BY_PROMPT:
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
    kind = _read(folder / "model_index.json").get("_class_name") if folder else _hub_class(str(model))
    name = COSTS.get(str(kind))
    if model is None or model in pipelines.EDITORS or pipelines.loading.embedded_editor(str(model)):
        assert folder is not None
        steps = MODELS["flux-kontext" if kind == "FluxKontextPipeline" else "qwen-image-edit"].default_steps
        passes = 1 if kind == "FluxKontextPipeline" else 2
        return Cost(_cost(folder, ModelCost({}, WORDS, passes, default_steps=steps)))
    if name is None:
        raise ValueError(f"--dry-run: expected a model whose cost is known, one of {', '.join(COSTS)}, got {model}")
    if kind == "Flux2KleinPipeline" and _is_small(model, folder):
        name = SMALL
    return Cost(MODELS[name] if folder is None else _cost(folder, MODELS[name]), name)


def predict(
    jobs: Iterable[Job], cost: Cost, *, edited: float, gpu: str | None = None, rate: float | None = None
) -> list[Group]:
    """Operations and seconds of jobs, in groups of rows that take the same.

    Args:
        edited: share of the picture that is edited where no mask says it.
        gpu: a name of `specedit.cost.roofline.GPUS`; seconds are then its roofline's.
        rate: operations a second, for seconds without `gpu`.

    Raises:
        ValueError: naming the argument; also a mask that cannot be read.
    """
    if gpu is not None and gpu not in GPUS:
        raise ValueError(f"--gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    counted: dict[tuple[Any, ...], int] = {}
    for job in jobs:
        settings = job.settings
        size = job.layout or (1024, 1024)
        share = edited if job.mask is None else round(_share(job.mask, size), 2)
        key = (size, settings.running, share, job.mask is None, "negative_prompt" in settings.guidance)
        counted[key] = counted.get(key, 0) + 1
    one = functools.partial(_group, cost, gpu, rate)
    return [one(*key, rows=rows) for key, rows in counted.items()]


def _group(
    cost: Cost, gpu: str | None, rate: float | None, size: tuple[int, int], config: SpecEditConfig, edited: float,
    drafts: bool, guided: bool, *, rows: int,
) -> Group:  # fmt: skip
    if config.method_options is not None:
        raise ValueError(f"--dry-run: expected rows without another method, got {config.name!r}")
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


def _hub_class(model: str) -> str | None:
    """The class in a hub pipeline's index, or if that cannot be read the one that its name says."""
    from diffusers import DiffusionPipeline

    try:
        return str(DiffusionPipeline.load_config(model)["_class_name"])
    except Exception:
        return next((kind for name, kind in BY_NAME.items() if name in model.lower()), None)


def _cost(folder: Path, usual: ModelCost) -> ModelCost:
    """`usual` with the sizes and the schedule in a pipeline's folder."""
    found = _read(folder / "transformer" / "config.json").items()
    transformer = {**usual.config, **{name: value for name, value in found if _is_number(value)}}
    scheduler = _read(folder / "scheduler" / "scheduler_config.json") or usual.scheduler
    return dataclasses.replace(usual, config=transformer, scheduler=scheduler)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_small(model: str, folder: Path | None) -> bool:
    """Whether a klein pipeline is the smaller one: by its size, or of one on the hub by its name."""
    if folder is None:
        return "4b" in model.lower()
    return _read(folder / "transformer" / "config.json").get("num_layers") == MODELS[SMALL].config["num_layers"]


def _read(file: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
