"""What a model family must provide so that the sampler can run it, and the state of one edit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..config import SpecEditConfig
from ..grid import GridSet, LayoutSet, MixedLayout, TokenGrid


@dataclass
class EditState:
    """One call of the pipeline, prepared: everything that the stages share.

    Tokens are packed 2 x 2 latent patches, (B, N, C); noise and references are float32.

    Of `extra`, which is the adapter's own, the call reads three entries: `dtype`, in which latents are shown to
    callbacks; `source`, the pictures that the edit is compared with, (B, 3, H, W) float32 in 0..1 at the output's size,
    or None; and `positive["encoder_hidden_states"]`, the prompt's embeddings, which a callback may replace.
    """

    grid: TokenGrid  # the output's
    noise: Tensor  # (B, grid.tokens, C) white noise, the call's own `latents`
    reference: Tensor  # (B, reference_grid.tokens, C): what the model is conditioned on
    reference_grid: TokenGrid | GridSet  # a GridSet where several pictures are given
    aligned: Tensor  # (B, grid.tokens, C): the reference on the output's own grid
    generator: torch.Generator | list[torch.Generator] | None
    text_tokens: float  # the mean where samples differ
    branches: int  # transformer calls a step: 2 under true classifier-free guidance
    pixels_per_token: int
    backend: str | None = None  # of specedit_kernels
    negative_text_tokens: float | None = None  # of the second branch, where its prompt has another length
    prompts: int = 1  # whose images stand together in the batch
    pictures: int = 1  # being edited, over which the batch repeats
    last_block: bool = False  # whether the transformer's last block computes the target's rows alone
    extra: dict[str, Any] = field(default_factory=dict)  # the adapter's own: embeddings, guidance, ...

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
