"""What the method asks of a model family (`Adapter`), and one run of it: `Run`, `EditState` and `LayoutGroup`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..config import SpecEditConfig
from ..geometry import PACKED, TokenGeometry
from ..layout import GridSet, LayoutSet, MixedLayout, TokenGrid
from ..placement import Placement, layouts_beside
from ..released import Released
from .expand import cell_detail
from .schedule import stage_sigmas, supported
from .sparse_blocks import BlockPredictor
from .trace import Trace

if TYPE_CHECKING:
    from ..forecast import ForecastRunner, PartialForward, ReferenceKVCache, TokenKVCache
    from .locked import LockedCells
    from .reference_selection import ReferenceMass


class Conditioning:
    """What a call conditions the model on, besides the reference. Every family has its own dataclass.

    dtype: of the embeddings, in which callbacks see latents. source: the pictures being edited, (B, 3, H, W) float32 in
    0..1, or (B, 4, H, W) where the model's have alpha, where they lie on the output, or None. prompt_embeds: of the
    prompt's branch; a callback may replace them.
    """

    dtype: torch.dtype = torch.float32
    source: Tensor | None = None
    prompt_embeds: Tensor | None = None


@dataclass
class EditState:
    """One call of the pipeline, prepared: everything that the stages share.

    Tokens (B, N, C) hold what `grid.geometry` says, by default packed 2 x 2 latent patches. Noise and references are
    float32.
    """

    grid: TokenGrid  # the output's
    noise: Tensor  # (B, grid.tokens, C) white noise, the call's own `latents`
    reference: Tensor  # (B, reference_grid.tokens, C): what the model is conditioned on
    reference_grid: TokenGrid | GridSet  # a GridSet where several pictures are given
    generator: torch.Generator | list[torch.Generator] | None
    text_tokens: float  # the mean where samples differ
    branches: int  # transformer calls a step: 2 under true classifier-free guidance
    pixels_per_token: int
    backend: str | None = None  # of specedit_kernels
    negative_text_tokens: float | None = None  # of the second branch, where its prompt has another length
    placements: tuple[Placement, ...] = ()  # of every reference; may be left out where their grids are the output's
    edited: int = 0  # which reference is being edited: the output is compared with it, and restored from it
    prompts: int = 1  # whose images stand together in the batch
    pictures: int = 1  # being edited, over which the batch repeats
    trims_last_block: bool = False  # whether the transformer's last block computes the target's rows alone
    fixed_prefix: bool = False  # as of the adapter: references stay fine, and the target is computed alone
    keeps_prefix: bool = True  # whether the stock call computes text and references once, where it can
    start: float = 1.0  # the noise level of the run's beginning, with the picture being edited below it
    conditioning: Conditioning = field(default_factory=Conditioning)  # the family's own: embeddings, guidance, ...
    draft_features: list[Tensor] | None = None  # of the reference at the draft's size, once it was verified beside one

    def __post_init__(self) -> None:
        if not self.placements:
            self.placements = tuple(Placement(self.grid, grid) for grid in self._grids)
            if not all(placement.is_same for placement in self.placements):
                raise ValueError(
                    "placements: expected where each reference lies, because their grids are not the output's, got none"
                )

    @property
    def _grids(self) -> tuple[TokenGrid, ...]:
        return self.reference_grid.grids

    @property
    def references(self) -> tuple[Tensor, ...]:
        """Every reference's tokens (B, n, C)."""
        references: tuple[Tensor, ...] = self.reference.split([grid.tokens for grid in self._grids], 1)
        return references

    @property
    def placement(self) -> Placement:
        """Where the picture being edited lies."""
        return self.placements[self.edited]

    @cached_property
    def aligned(self) -> Tensor:
        """(B, grid.tokens, C): the picture being edited on the output's grid, its border repeated beyond it."""
        return self.placement.place(self.references[self.edited])

    @cached_property
    def reference_detail(self) -> Tensor:
        """(B, cells, pixels, channels, 3): Haar detail of the aligned reference, arranged as in `cell_detail`."""
        return cell_detail(self.aligned, self.grid)

    @cached_property
    def split_noise(self) -> Tensor:
        """Likewise of the call's own noise: what the coarse stage's start leaves out."""
        return cell_detail(self.noise, self.grid, mode="circular")

    @cached_property
    def covered(self) -> Tensor | None:
        """(h, w) bool: the output's tokens that the picture being edited covers; None where it covers all."""
        return None if self.placement.covers else self.placement.covered.to(self.device)

    @cached_property
    def uncovered_cells(self) -> Tensor | None:
        """(cells_h, cells_w) bool: cells that the picture covers in part or not at all; None where it covers all."""
        if self.covered is None:
            return None
        return F.max_pool2d((~self.covered)[None, None].float(), 2, ceil_mode=True)[0, 0] > 0

    @cached_property
    def _fine_beside(self) -> MixedLayout | LayoutSet:
        return layouts_beside(MixedLayout.all_fine(self.grid, self.device), self.placements)

    def beside(self, layout: MixedLayout, scale: int = 1) -> MixedLayout | LayoutSet:
        """The references' layout for a target's. scale: of a draft, whose tokens are cells of so many a side."""
        if self.fixed_prefix:
            return self._fine_beside
        return layouts_beside(layout, tuple(p.cells(scale) if scale > 1 else p for p in self.placements))

    @property
    def texts(self) -> tuple[float, ...]:
        """Text tokens of every guidance branch, the prompt's first."""
        negative = self.text_tokens if self.negative_text_tokens is None else self.negative_text_tokens
        return (self.text_tokens, negative)[: self.branches]

    @property
    def batch(self) -> int:
        return self.noise.shape[0]

    @property
    def device(self) -> torch.device:
        return self.noise.device

    def draw(self, tokens: int) -> Tensor:
        """(B, tokens, C) float32 white noise from the caller's generator."""
        shape = (self.batch, tokens, self.noise.shape[2])
        noise: Tensor = randn_tensor(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return noise


@dataclass
class LayoutGroup:
    """Samples of the batch that share a layout, and their state.

    rows: which samples, b of them. tokens (b, layout.tokens, C) at the noise level `sigmas[i]` before step i. forecast,
    kv, tokens_kv: caches of this stage, which end with it. blocks: which blocks of keys attention reads; None: all.
    clean: what the last step predicted, x0 = x - s v, where the coarse stage is verified. inputs: what an adapter makes
    once for this group and stage, by its own keys. locked: cells that left the target of a mixed sequence. mass: the
    attention that the reference's tokens get, in a step that measures it.
    """

    rows: list[int]
    layout: MixedLayout
    reference: Tensor
    reference_layout: MixedLayout | LayoutSet
    tokens: Tensor
    sigmas: list[float]
    forecast: ForecastRunner | None = None
    kv: ReferenceKVCache | None = None
    tokens_kv: TokenKVCache | None = None
    blocks: BlockPredictor | None = None
    clean: Tensor | None = None
    inputs: dict[Any, Any] = field(default_factory=dict)
    cached: int = 0  # steps that were not computed fully
    reused: int = 0  # steps that ran over some tokens alone, with keys and values of the others kept
    locked: LockedCells | None = None
    mass: ReferenceMass | None = None

    @property
    def computed(self) -> LayoutGroup:
        """The group that the transformer computes: this one, but for cells that left the sequence."""
        return self if self.locked is None else self.locked.computed(self)

    @property
    def cache_bytes(self) -> int:
        """Memory that the caches hold, and what the adapter keeps."""
        caches = sum(cache.memory for cache in (self.forecast, self.kv, self.tokens_kv) if cache is not None)
        return caches + sum(getattr(kept, "memory", 0) for kept in self.inputs.values())


@dataclass
class Run:
    """One edit under way: `adapter` computes it on `pipe` as `config` says, and `trace` follows it.

    finding: score and edited cells that a draft has found, this run's once it has made one. Where one is given, from an
    earlier run that differs in its noise alone, no draft is made. modulation: the adapter's, computed once; it counts
    its `passes` over the weights and its `memory` in bytes. None where every step computes it.

    Raises:
        ValueError: the state's grid has another token geometry than the adapter.
    """

    adapter: Adapter
    pipe: Any
    config: SpecEditConfig
    state: EditState
    trace: Trace = field(default_factory=Trace)
    finding: tuple[Tensor | None, Tensor] | None = None
    modulation: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.adapter, Adapter) and self.state.grid.geometry != self.adapter.geometry:
            raise ValueError(
                f"grid: expected the token geometry of {self.adapter.name}, patch={self.adapter.geometry.patch}, "
                f"got patch={self.state.grid.geometry.patch}; make grids with TokenGrid(height, width, self.geometry)"
            )

    def set_current_timestep(self, sigma: float) -> Tensor:
        """Show a step's timestep, () float32, as `pipe.current_timestep`, which hooks on the transformer may read."""
        # Filled on the device: a copy from the host would wait for the step before to end.
        timestep = torch.full((), sigma * 1000, device=self.state.device)
        self.pipe._current_timestep = timestep  # which another thread's call may replace at once
        return timestep


def active_branches(state: EditState, config: SpecEditConfig, sigma: float) -> int:
    """Guidance branches of a step at `sigma`: the prompt's alone outside `guidance_range` (arXiv 2404.07724)."""
    low, high = config.guidance_range or (0.0, 1.0)
    return state.branches if low <= sigma <= high else 1


def rows_index(rows: list[int], device: torch.device) -> slice | Tensor:
    """An index that picks `rows`, without copying where they are consecutive: a list would be sent to the device anew
    by every step, and the step would wait for it."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)


def place_references(
    adapter: Adapter, pipe: Any, output: TokenGrid, references: TokenGrid | GridSet
) -> tuple[Placement, ...]:
    """Where each reference lies on the output, by the adapter's `reference_offset`."""
    return tuple(Placement(output, grid, *adapter.reference_offset(pipe, output, grid)) for grid in references.grids)


class Adapter(ABC):
    """A model family. One instance serves one installed pipeline; what a run needs travels in the `Run`."""

    name: ClassVar[str]
    pipelines: ClassVar[str]  # the classes it serves, for messages
    token_wise: ClassVar[bool] = False  # whether `predict` computes single tokens
    keeps_reference: ClassVar[bool] = False  # whether it computes the target's tokens alone
    skips_blocks: ClassVar[bool] = False  # whether its attention follows a group's `blocks`
    skips_tokens: ClassVar[bool] = False  # whether it leaves tokens out, the same ones in every guidance branch
    measures_attention: ClassVar[bool] = False  # whether `predict` adds to `group.mass` where there is one
    encodes_pixels: ClassVar[bool] = False  # whether it has `encode`
    decodes_boxes: ClassVar[bool] = False  # whether it has `decode_edited`
    approximates_boxes: ClassVar[bool] = False  # whether that comes near the whole decode, not to within rounding
    fixed_reference: ClassVar[bool] = False  # whether the references' keys never change: a stage's first step has them
    fixed_prefix: ClassVar[bool] = False  # whether text and references never change, and are computed once a run, fine
    aligns_phases: ClassVar[bool] = True  # whether it runs rope="phase_aligned"
    geometry: ClassVar[TokenGeometry] = PACKED  # what its tokens hold; `prepare` gives it to every grid
    released: ClassVar[tuple[Released, ...]] = ()  # the models whose costs are known
    uncosted: ClassVar[str] = ""  # or why none's are
    calls: ClassVar[tuple[type, ...]] = ()  # classes outside diffusers whose `__call__` it runs as they do

    @staticmethod
    @abstractmethod
    def matches(pipe: Any) -> bool:
        """Whether this adapter knows the pipeline's class."""

    @abstractmethod
    def refusal(self, pipe: Any, call: dict[str, Any], attention: str) -> str | None:
        """Why this call cannot be accelerated (one phrase), or None. `attention`: of the configuration."""

    def own_mask(self, pipe: Any, call: dict[str, Any]) -> Any:
        """The mask that a call of an inpainting pipeline brings, as `masks.read` takes it; None of all others."""
        return None

    def strength(self, call: dict[str, Any]) -> float:
        """Which share of the schedule a call runs, above 0; below 1 it begins with the noised picture.

        Goes with `EditState.start`.
        """
        return 1.0

    @abstractmethod
    def prepare(self, pipe: Any, call: dict[str, Any], config: SpecEditConfig) -> EditState:
        """Check and encode the call's arguments as the stock pipeline does."""

    @abstractmethod
    def reference_offset(self, pipe: Any, output: TokenGrid, reference: TokenGrid) -> tuple[int, int]:
        """Row and column of the output's grid at which the model's positions put the reference's first token."""

    @abstractmethod
    def call_size(self, pipe: Any, picture: Any) -> dict[str, Any]:
        """Size arguments of the call that give the output the grid of the picture being edited; see `size_for`."""

    def taken_size(self, pipe: Any, picture: Any) -> tuple[int, int]:
        """Height and width at which the model takes a PIL image, those of its output too."""
        size = self.call_size(pipe, picture)
        return size.get("height", picture.height), size.get("width", picture.width)

    def draft_state(self, run: Run) -> EditState:
        """The draft's state: the run's, or a copy with what a smaller image changes."""
        return run.state

    def sigmas(self, pipe: Any, tokens: int, start: float, end: float, steps: int) -> Tensor:
        """Sigmas (steps + 1,) float32 of a stage of `tokens` target tokens: the model's schedule in [end, start]."""
        return stage_sigmas(pipe.scheduler, tokens, start, end, steps)

    def asked_steps(self, pipe: Any, asked: int | None) -> int | None:
        """Steps of a call with `num_inference_steps=asked`; None: those of the configuration.

        With the stock call's default, the stock pipeline's. Override it for pipelines with a schedule of their own.
        """
        return asked

    def schedule_refusal(self, pipe: Any) -> str | None:
        """Why `sigmas` is not the schedule of the pipeline as it is now (one phrase), or None. Goes with `sigmas`."""
        return supported(getattr(pipe, "scheduler", None))

    @abstractmethod
    def predict(
        self, run: Run, group: LayoutGroup, sigma: float, partial: list[PartialForward] | None = None
    ) -> list[Tensor]:
        """Outputs (b, N, C) float32 of the transformer for every active guidance branch, the prompt's first.

        partial: None, or for each branch what has the attention modules keep keys and values, and may ask for the
        outputs (b, m, C) of some target tokens alone (`token_wise`; `skips_tokens` where every branch has the same
        index), or for a forward pass over the target's tokens alone (`keeps_reference`).
        """

    @abstractmethod
    def guide(self, run: Run, outputs: list[Tensor]) -> Tensor:
        """Velocity from the branches' outputs: classifier-free guidance, or the only one as it is."""

    def why_modulated_every_step(self, pipe: Any) -> str | None:
        """Why modulation="once" has no effect on this pipeline (one phrase), or None."""
        return f"{self.name} does not say where its transformer makes the modulation"

    def modulated_once(self, run: Run, sigmas: Sequence[float]) -> AbstractContextManager[None]:
        """Inside, `predict` takes the modulation of all timesteps from `run.modulation`. Goes with
        `why_modulated_every_step`. sigmas: of steps to come, as far as they are known before the run."""
        raise NotImplementedError(f"{self.name} computes its modulation in every step")

    def velocity(self, run: Run, group: LayoutGroup, sigma: float) -> Tensor:
        """Velocity e - x0 (b, N, C) float32 of a group."""
        return self.guide(run, self.predict(run, group, sigma))

    @abstractmethod
    def features(self, pipe: Any, tokens: Tensor, grid: TokenGrid) -> list[Tensor]:
        """Decoder features of clean tokens (B, N, C): conv_in, mid_block, first up block, each (B, c, h, w)."""

    def finish(self, state: EditState, tokens: Tensor) -> Tensor:
        """What a run's clean tokens (B, N, C) become before they are decoded: what the call keeps is put back."""
        return tokens

    @abstractmethod
    def decode(self, pipe: Any, state: EditState, tokens: Tensor, output_type: str) -> Any:
        """Clean tokens (B, N, C) of the full grid to images, as the stock pipeline returns them."""

    def decode_edited(
        self, pipe: Any, state: EditState, tokens: Tensor, output_type: str, cells: Tensor
    ) -> tuple[Any, float]:
        """What `decode` gives, where it need only be right in some cells, and the share of the pictures decoded.

        cells (B, h, w) bool, of two tokens a side. Other pixels are unspecified. With `approximates_boxes`, the pixels
        in the cells are near those of `decode`, and the same where the share is 1.
        """
        raise NotImplementedError(f"{self.name} decodes whole pictures; see decodes_boxes")

    def encode(self, pipe: Any, pictures: Tensor, grid: TokenGrid) -> Tensor:
        """Pictures (B, 3, H, W) float32 in 0..1 of a grid's size to clean tokens (B, N, C), as of a reference."""
        raise NotImplementedError(f"{self.name} does not encode pictures; see encodes_pixels")

    @abstractmethod
    def output(self, images: Any) -> Any:
        """What the stock pipeline returns for `return_dict=True`."""

    @abstractmethod
    def attach(self, pipe: Any) -> None:
        """Put this package's attention processors in place; idempotent. Touches nothing but `pipe.transformer`."""

    @abstractmethod
    def detach(self, pipe: Any) -> None:
        """Put back exactly what `attach` replaced. Only `pipe.transformer` is read; other pipelines may share it."""
