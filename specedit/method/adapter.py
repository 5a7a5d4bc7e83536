"""What a model family must provide so that the sampler can run it, and the state of one edit."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..config import SpecEditConfig
from ..layout import GridSet, LayoutSet, MixedLayout, TokenGrid
from ..placement import Placement, layouts_beside


@dataclass
class EditState:
    """One call of the pipeline, prepared: everything that the stages share.

    Tokens are packed 2 x 2 latent patches, (B, N, C); noise and references are float32.

    Of `extra`, which is the adapter's own, the call reads three entries: `dtype`, in which latents are shown to
    callbacks; `source`, the pictures being edited, (B, 3, H, W) float32 in 0..1, where they lie on the output, or None;
    and `positive["encoder_hidden_states"]`, the prompt's embeddings, which a callback may replace.
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
    last_block: bool = False  # whether the transformer's last block computes the target's rows alone
    extra: dict[str, Any] = field(default_factory=dict)  # the adapter's own: embeddings, guidance, ...

    def __post_init__(self) -> None:
        if not self.placements:
            self.placements = tuple(Placement(self.grid, grid) for grid in self._grids)
            if not all(placement.is_same for placement in self.placements):
                raise ValueError(
                    "placements: expected where each reference lies, because their grids are not the output's, got none"
                )

    @property
    def _grids(self) -> tuple[TokenGrid, ...]:
        return getattr(self.reference_grid, "grids", (self.reference_grid,))

    @property
    def references(self) -> tuple[Tensor, ...]:
        """Every reference's tokens (B, n, C)."""
        return self.reference.split([grid.tokens for grid in self._grids], 1)

    @property
    def placement(self) -> Placement:
        """Where the picture being edited lies."""
        return self.placements[self.edited]

    @cached_property
    def aligned(self) -> Tensor:
        """(B, grid.tokens, C): the picture being edited on the output's grid, its border repeated beyond it."""
        return self.placement.place(self.references[self.edited])

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

    def beside(self, layout: MixedLayout, scale: int = 1) -> MixedLayout | LayoutSet:
        """The references' layout beside the target's. scale: of a draft, whose tokens are cells of so many a side."""
        return layouts_beside(layout, tuple(p.cells(scale) if scale > 1 else p for p in self.placements))

    @property
    def batch(self) -> int:
        return self.noise.shape[0]

    @property
    def device(self) -> torch.device:
        return self.noise.device

    def draw(self, tokens: int) -> Tensor:
        """(B, tokens, C) float32 white noise from the caller's generator."""
        shape = (self.batch, tokens, self.noise.shape[2])
        return randn_tensor(shape, generator=self.generator, device=self.device, dtype=torch.float32)


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
    grids = getattr(references, "grids", (references,))
    return tuple(Placement(output, grid, *adapter.reference_offset(pipe, output, grid)) for grid in grids)


class Adapter(Protocol):
    """A model family. One instance serves one installed pipeline; what a run needs travels in the state."""

    name: str
    pipelines: str  # the classes it serves, for messages
    token_wise: bool  # whether `branches` takes calls for single tokens
    keeps_reference: bool  # whether it takes calls for the target's tokens alone

    @staticmethod
    def matches(pipe: Any) -> bool:
        """Whether this adapter knows the pipeline's class."""

    def refusal(self, pipe: Any, call: dict[str, Any], backend: str) -> str | None:
        """Why this call cannot be accelerated (one phrase), or None. `backend`: `attention` of the configuration."""

    def prepare(self, pipe: Any, call: dict[str, Any], attention: str) -> EditState:
        """Check and encode the call's arguments as the stock pipeline does."""

    def reference_offset(self, pipe: Any, output: TokenGrid, reference: TokenGrid) -> tuple[int, int]:
        """Row and column of the output's grid at which the model's positions put the reference's first token."""

    def call_size(self, pipe: Any, picture: Any) -> dict[str, Any]:
        """Size arguments of the call that give the output the grid of the picture being edited; see `size_for`."""

    def draft_state(self, pipe: Any, state: EditState, config: Any) -> EditState:
        """The state that the draft runs with: `state` itself, or one with what a small image of its own changes."""

    def velocity(
        self,
        pipe: Any,
        state: EditState,
        tokens: Tensor,
        sigma: float,
        rows: list[int],
        layout: MixedLayout,
        reference: Tensor,
        reference_layout: MixedLayout | LayoutSet,
        config: Any,
    ) -> Tensor:
        """Velocity e - x0 (b, N, C) float32 of the batch rows `rows`, whose tokens share `layout`."""

    def branches(
        self, pipe: Any, state: EditState, tokens: Tensor, sigma: float, rows: list[int], layout: MixedLayout,
        reference: Tensor, reference_layout: MixedLayout, config: Any, calls: list[Any] | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """What `velocity` combines: the output (b, N, C) float32 of every branch that is active, the prompt's first.

        `calls`: None, or for each branch a `forecast.toca.TokenCall` that has the attention modules keep keys and
        values, and may ask for the outputs (b, m, C) of some target tokens alone (where the adapter is `token_wise`),
        or to compute nothing but the target's tokens (`keeps_reference`).
        """

    def guide(self, state: EditState, outputs: list[Tensor]) -> Tensor:
        """Velocity from the branches' outputs: classifier-free guidance, or the only one as it is."""

    def features(self, pipe: Any, tokens: Tensor, grid: TokenGrid) -> list[Tensor]:
        """Decoder features of clean tokens (B, N, C): conv_in, mid_block, first up block, each (B, c, h, w)."""

    def decode(self, pipe: Any, state: EditState, tokens: Tensor, output_type: str) -> Any:
        """Clean tokens (B, N, C) of the full grid to images, as the stock pipeline returns them."""

    def output(self, images: Any) -> Any:
        """What the stock pipeline returns for `return_dict=True`."""

    def attach(self, pipe: Any) -> None:
        """Put this package's attention processors in place; idempotent. Touches nothing but `pipe.transformer`."""

    def detach(self, pipe: Any) -> None:
        """Put back exactly what `attach` replaced. Of `pipe` only `transformer` is read, which other ones may share."""
