"""One evaluation of Qwen-Image's transformer over any token layout, under one prompt or several at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..grid import LayoutSet, MixedLayout
from . import attention
from .base import EditState
from .qwen_positions import PlacedImages, all_positions, angles, phases


class Inputs:
    """The tokens of a step and where they lie, and the two ways to run prompts over them: `packed` and `dense`."""

    def __init__(
        self,
        pipe: Any,
        state: EditState,
        tokens: Tensor,
        reference: Tensor,
        sigma: float,
        rows: list[int],
        layout: MixedLayout,
        reference_layout: MixedLayout | LayoutSet,
        config: Any,
    ):
        self.pipe, self.state, self.rows, self.config = pipe, state, rows, config
        self.tokens, self.reference, self.sigma = tokens, reference, sigma
        self.mixed = layout.is_mixed or reference_layout.is_mixed
        positions = all_positions(layout, reference_layout, pipe.transformer.pos_embed.scale_rope)
        self.positions = [at.to(tokens.device) for at in positions]  # of the target's tokens and the references'
        area = [layout.area, torch.cat([part.area for part in reference_layout.parts])]
        self.area = [a.to(tokens.device) for a in area]

    def packed(self, prompts: list[dict[str, Any]]) -> list[Tensor]:
        """Velocities (b, N, C) float32 under each prompt: every sample under every prompt is a sequence of one pass.

        The streams are [texts of all sequences] and [targets of all | references of all]; in attention each sequence
        is [text | target | reference] by itself, and no token is padding.
        """
        (b, n, _), r, device = self.tokens.shape, self.reference.shape[1], self.tokens.device
        texts, indices, lengths = [], [], []
        for prompt in prompts:
            text, index, count = text_rows(prompt, self.rows)
            texts.append(text)
            indices.append(index)
            lengths += count
        sequences = len(lengths)
        packing = attention.pack(lengths, n, r, device)
        text_at = self._text_positions(torch.cat(indices))

        def stream(target: Tensor, reference: Tensor) -> Tensor:
            """One row for each image token of the stream."""
            return torch.cat([part.repeat(sequences, *[1] * (part.ndim - 1)) for part in (target, reference)])

        def tables(scale: float) -> tuple[Tensor, Tensor]:
            image_at = stream(*(_scaled(at, scale) for at in self.positions))
            angle = angles(self.pipe.transformer.pos_embed, torch.cat([text_at, image_at]))
            return angle.cos(), angle.sin()

        area = stream(*self.area)
        bias = segments = coarse = None
        if self._biased:
            bias = torch.zeros(len(text_at) + len(area), device=device)
            bias[packing.image] = area.log()
            bias = bias[None]
        if self.mixed and self.config.rope == "phase_aligned":
            is_coarse = torch.zeros(len(text_at) + len(area), dtype=torch.bool, device=device)
            is_coarse[packing.image] = area > 1
            segments = attention.segments(is_coarse, [length + n + r for length in lengths])
            coarse = tables(0.5)
        context = attention.MixedContext(bias, segments, coarse, self.state.backend, packing)
        out = self._run(
            torch.cat([x.repeat(len(prompts), 1, 1).flatten(0, 1) for x in (self.tokens, self.reference)])[None],
            torch.cat(texts)[None],
            PlacedImages(sequences * n, sequences * r, 1, tables(1.0)),
            {"specedit": context},
        )
        return list(out[0, : sequences * n].unflatten(0, (len(prompts), b, n)))

    def dense(self, prompt: dict[str, Any]) -> Tensor:
        """Velocity (b, N, C) float32 under one prompt, by the model's own processors.

        Those take no bias per key, so where there is one its sum goes to the model's attention backend as a mask.
        """
        embeds, mask = prompt["encoder_hidden_states"][self.rows], prompt["mask"]
        (b, n, _), r, length = self.tokens.shape, self.reference.shape[1], embeds.shape[1]
        mask = None if mask is None else mask[self.rows]
        text_at = self._text_positions(torch.arange(length, device=embeds.device))
        extra = {}
        if self._biased:
            angle = angles(self.pipe.transformer.pos_embed, torch.cat([text_at, *self.positions]))
            frequencies = angle.cos(), angle.sin()
            text = torch.zeros(b, length, device=embeds.device)
            if mask is not None:
                text = text.masked_fill(~mask, -torch.inf)
            bias = torch.cat([text, torch.cat(self.area).log().expand(b, -1)], 1)
            extra["specedit"] = attention.MixedContext(bias, backend="stock")
        else:
            at = torch.cat(self.positions), text_at
            frequencies = tuple(phases(angles(self.pipe.transformer.pos_embed, x)) for x in at)
        placed = PlacedImages(n, r, b, frequencies)
        return self._run(torch.cat([self.tokens, self.reference], 1), embeds, placed, extra, mask)[:, :n]

    @property
    def _biased(self) -> bool:
        return self.mixed and self.config.key_bias == "area"

    def _text_positions(self, index: Tensor) -> Tensor:
        """(L, 3): text lies beyond the images, at the same number on every axis."""
        return (self.state.extra["offset"] + index).float()[:, None].expand(-1, 3)

    def _run(self, states, embeds, placed: PlacedImages, extra: dict[str, Any], mask: Tensor | None = None) -> Tensor:
        dtype = self.state.extra["dtype"]
        timestep = torch.full((len(states),), self.sigma * 1000, device=states.device, dtype=torch.float32)
        return self.pipe.transformer(
            hidden_states=states.to(dtype),
            timestep=timestep.to(dtype) / 1000,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=placed,
            attention_kwargs=self.state.extra["kwargs"] | extra,  # a new one: the transformer takes the LoRA scale out
            return_dict=False,
        )[0].float()


def text_rows(prompt: dict[str, Any], rows: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """Text tokens (T, D) of the samples one after the other without padding, their index, and how many of each."""
    embeds, mask = prompt["encoder_hidden_states"][rows], prompt["mask"]
    if mask is None:
        index = torch.arange(embeds.shape[1], device=embeds.device).repeat(len(rows))
        return embeds.flatten(0, 1), index, [embeds.shape[1]] * len(rows)
    mask = mask[rows]
    return embeds[mask], mask.nonzero()[:, 1], [prompt["lengths"][row] for row in rows]


def _scaled(positions: Tensor, scale: float) -> Tensor:
    """Rows and columns at another scale, in the same frame."""
    return torch.cat([positions[:, :1], positions[:, 1:] * scale], 1)


def guided(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """True classifier-free guidance, rescaled to the norm that each token's velocity has under the prompt alone."""
    combined = negative + scale * (positive - negative)
    return combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
