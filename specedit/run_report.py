"""What a run did: `RunReport`, its table and its JSON form."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from PIL import Image

from .config import STOCK_STEPS, SpecEditConfig


@dataclass(frozen=True)
class StageReport:
    """One stage of a run.

    Args:
        name: "draft", "coarse", "mixed", "full", or work outside the transformer, such as "encode", "verify", "decode".
        sigma_start, sigma_end: the noise levels between which the stage ran; None outside the transformer.
        steps: model evaluations; guidance passes are not counted twice.
        tokens: length of one sample's sequence (text + target + reference) in the first step; the mean where samples
            differ. With `reference_keep` the later steps have fewer.
        flops: operations of the whole stage over the whole batch, guidance passes included.
        seconds: wall-clock time of the whole stage.
        cached: steps that a temporal cache forecast, for all or most tokens.
        reused: steps that computed some tokens only, with cached keys and values of the others (`reference_refresh`,
            `locked="cached"`, and the methods "spotedit" and "regione").
    """

    name: str
    sigma_start: float | None
    sigma_end: float | None
    steps: int
    tokens: float
    flops: float
    seconds: float
    cached: int = 0
    reused: int = 0


def _grid(name: str, value: Any, kind: str) -> torch.Tensor | None:
    """A (B, h, w) CPU tensor of scores or booleans, or None."""
    if value is None:
        return None
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor (B, h, w) or None, got {type(value).__name__}")
    if value.ndim != 3:
        raise ValueError(f"{name}: expected shape (B, h, w), got {tuple(value.shape)}")
    if kind == "bool" and value.dtype != torch.bool:
        raise TypeError(f"{name}: expected dtype torch.bool, got {value.dtype}")
    grid: torch.Tensor = value.detach().cpu()
    return grid if kind == "bool" else grid.float()


def _share(mask: torch.Tensor | None) -> float:
    return 1.0 if mask is None else mask.float().mean().item()


@dataclass(kw_only=True)
class RunReport:
    """What one call of an installed pipeline did.

    Args:
        nfe: model evaluations of the main run; `draft_steps` those of the draft (0 when none ran).
        stages: in the order they ran, the draft among them.
        flops: operations of the transformer in the whole run, draft included, whole batch.
        stock_steps: steps of the stock run to compare with: the call's num_inference_steps, or the pipeline's default.
        flops_stock: operations of the stock pipeline with that many full steps.
        seconds: wall-clock time of the call.
        edit_fraction, expand_fraction: share of coarse cells edited (dilation included) and expanded (uniform coverage
            included), averaged over the batch. Computed from the masks if left out; 1.0 without a mask.
        score: verification score on the token grid, float (B, h, w), 0..4; None if nothing was verified.
        edit_mask, expand_mask: bool (B, hc, wc) on the coarse grid; None if the run had no mask.
        preset: name for the table and figure. Taken from `config` if left out.
        config: the configuration that ran.
        cache_bytes: peak memory of temporal caches.
        empty_drafts: samples whose draft showed no change, or without a draft their coarse stage. With
            restore="reference" or keep_pixels they were edited as a whole, unless the coarse stage showed a change;
            otherwise the input would come back.
        overflowed: samples whose verification score was not finite; they were edited as a whole.
        reused: with `reuse_encodings`, how many "prompts" and "pictures" (references) were not encoded again, in a
            session "renditions" (the picture, decoded unedited), and under "findings" 1 where an earlier call's draft,
            of another seed or the same, said what to edit; `score` is that draft's. Empty if nothing was reused.
        decoded_fraction: share of the pictures that was decoded, with what lies around it and what group norms look
            at; below 1 with decode="edited" where the edit is small and the autoencoder neither tiled, compiled nor
            offloaded by layers.
        modulation: with modulation="once" the "passes" over the weights that make it, and the "bytes" that were kept;
            empty where every step computed it.
        overruled_steps: num_inference_steps that a server sent without its client's asking, so that the preset's steps
            ran; None of any other call.
        source, edit: PIL images of the first sample for the figure; not part of `to_dict`.

    Raises:
        TypeError, ValueError: a grid of the wrong type or shape.
    """

    nfe: int
    draft_steps: int
    stages: list[StageReport]
    flops: float
    flops_stock: float
    seconds: float
    edit_fraction: float | None = None
    expand_fraction: float | None = None
    score: torch.Tensor | None = None
    edit_mask: torch.Tensor | None = None
    expand_mask: torch.Tensor | None = None
    preset: str | None = None
    config: SpecEditConfig | None = None
    source: Image.Image | None = dataclasses.field(default=None, repr=False)
    edit: Image.Image | None = dataclasses.field(default=None, repr=False)
    cache_bytes: int = 0
    empty_drafts: int = 0
    stock_steps: int = STOCK_STEPS
    overflowed: int = 0
    reused: dict[str, int] = dataclasses.field(default_factory=dict)
    decoded_fraction: float = 1.0
    modulation: dict[str, int] = dataclasses.field(default_factory=dict)
    overruled_steps: int | None = None

    def __post_init__(self) -> None:
        self.stages = list(self.stages)
        self.score = _grid("score", self.score, "float")
        self.edit_mask = _grid("edit_mask", self.edit_mask, "bool")
        self.expand_mask = _grid("expand_mask", self.expand_mask, "bool")
        if self.edit_fraction is None:
            self.edit_fraction = _share(self.edit_mask)
        if self.expand_fraction is None:
            self.expand_fraction = _share(self.expand_mask)
        if self.preset is None and self.config is not None:
            self.preset = self.config.name

    @property
    def flops_ratio(self) -> float:
        """Operations of `stock_steps` stock steps over those of this run; inf if the run computed nothing."""
        return self.flops_stock / self.flops if self.flops else math.inf

    @property
    def flops_ratio_50(self) -> float:
        """Operations of 50 stock steps over those of this run, as in the paper; inf if the run computed nothing."""
        return self.flops_ratio * (STOCK_STEPS / self.stock_steps)

    @property
    def cached_steps(self) -> int:
        """Steps of the main run that a temporal cache forecast."""
        return sum(stage.cached for stage in self.stages)

    @property
    def reused_steps(self) -> int:
        """Steps of the main run that computed some tokens only, with cached keys and values of the others."""
        return sum(stage.reused for stage in self.stages if stage.name != "draft")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, ready for `json.dumps`.

        Score and masks become nested lists (B, h, w), scores rounded to 4 decimals. Images are left out. Ratios and
        scores that are not finite become None.
        """
        grids = {name: getattr(self, name) for name in ("edit_mask", "expand_mask")}
        score = None
        if self.score is not None:
            score = [[[_finite(round(v, 4)) for v in row] for row in sample] for sample in self.score.tolist()]
        return {
            "preset": self.preset,
            "config": dataclasses.asdict(self.config) if self.config is not None else None,
            "nfe": self.nfe,
            "draft_steps": self.draft_steps,
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "edit_fraction": self.edit_fraction,
            "expand_fraction": self.expand_fraction,
            "flops": self.flops,
            "stock_steps": self.stock_steps,
            "flops_stock": self.flops_stock,
            "flops_ratio": _finite(self.flops_ratio),
            "flops_ratio_50": _finite(self.flops_ratio_50),
            "seconds": self.seconds,
            "cached_steps": self.cached_steps,
            "reused_steps": self.reused_steps,
            "cache_bytes": self.cache_bytes,
            "missed": self.empty_drafts,
            "overflowed": self.overflowed,
            "reused": dict(self.reused),
            "decoded_fraction": self.decoded_fraction,
            "modulation": dict(self.modulation),
            "overruled_steps": self.overruled_steps,
            "score": score,
            **{name: grid.tolist() if grid is not None else None for name, grid in grids.items()},
        }

    def table(self) -> list[tuple[str, ...]]:
        """The table's lines as cells: a head, one line per stage, and the total."""
        stages = [
            (s.name, _sigmas(s), str(s.steps), f"{s.tokens:,.0f}", _tera(s.flops), f"{s.seconds:.2f}")
            for s in self.stages
        ]
        total = ("total", "", f"{self.nfe} + {self.draft_steps}", "", _tera(self.flops), f"{self.seconds:.2f}")
        return [("stage", "sigma", "steps", "tokens", "TFLOPs", "seconds"), *stages, total]

    def __str__(self) -> str:
        lines = self.table()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

        def line(cells: tuple[str, ...]) -> str:
            words = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
            return "  ".join(words).rstrip()

        head, *stages, total = map(line, lines)
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        return "\n".join([self.title(), rule, head, rule, *stages, rule, total])

    def _repr_html_(self) -> str:
        """What a notebook shows: the title, the figure as a picture in the page, and the table."""
        from .report_html import render

        return render(self)

    def title(self) -> str:
        """One line: the preset, its steps, what was saved and how much was edited."""
        name = f"SpecEdit {self.preset}" if self.preset else "SpecEdit"
        counts = [(self.cached_steps, "cached"), (self.reused_steps, f"on {self._reusing()} alone")]
        apart = ", ".join(f"{count} {what}" for count, what in counts if count)
        samples = max((len(grid) for grid in (self.score, self.edit_mask) if grid is not None), default=1)
        seen = "drafts" if self.draft_steps else "coarse stages"
        return (
            f"{name}: NFE {self.nfe}{f' ({apart})' if apart else ''} + {self.draft_steps} draft, "
            f"{self._compared()}, {self.edit_fraction:.0%} edited, {self.expand_fraction:.0%} expanded"
            + (f", {self.decoded_fraction:.0%} decoded" if self.decoded_fraction < 1 else "")
            + (f"; {self.empty_drafts} of {samples} {seen} showed no change" if self.empty_drafts else "")
            + (f"; {self.overflowed} of {samples} scores were not finite" if self.overflowed else "")
            + (f"; reused {self._reused_inputs()}" if self.reused else "")
            + (f"; the server's {self.overruled_steps} steps did not count" if self.overruled_steps else "")
        )

    def _reused_inputs(self) -> str:
        """What was not encoded or drafted again, as "2 prompts, 1 picture"."""
        words = {
            "prompts": "prompt",
            "pictures": "picture",
            "renditions": "rendition",
            "findings": "finding of an earlier draft",
        }
        counts = [(count, words.get(name, name)) for name, count in self.reused.items()]
        return ", ".join(f"{count} {word}{'s' if count > 1 else ''}" for count, word in counts)

    def _reusing(self) -> str:
        """The tokens that `reused_steps` compute."""
        if self.config is not None and self.config.method_options is not None:
            return "some tokens"
        return "fine tokens" if self.config is not None and self.config.locked == "cached" else "the target"

    def _compared(self) -> str:
        """The comparison with `stock_steps` stock steps, and with the paper's 50 if these differ."""
        text = f"{self.stock_steps} stock steps take {self.flops_ratio:.2f}x the FLOPs"
        return text if self.stock_steps == STOCK_STEPS else f"{text}; {STOCK_STEPS} take {self.flops_ratio_50:.2f}x"

    def save_figure(self, path: str | PathLike[str], sample: int = 0) -> None:
        """Write a figure: source, edit, score over the image, masks; below them seconds and TFLOPs per stage.

        Panels whose data the run did not have stay out.

        Args:
            path: file to write; its suffix chooses the format.
            sample: which sample of the batch the score and masks are shown for. `source` and `edit` are one image each.

        Raises:
            ValueError: no such sample, or a suffix that matplotlib does not know.
        """
        from .report_figure import save

        save(self, path, sample)


def _sigmas(stage: StageReport) -> str:
    if stage.sigma_start is None or stage.sigma_end is None:
        return "-"
    return f"{stage.sigma_start:.2f} -> {stage.sigma_end:.2f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.3g}" if flops < 1e14 else f"{flops / 1e12:,.0f}"
