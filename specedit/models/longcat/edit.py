"""LongCat-Image-Edit: FLUX's blocks and autoencoder, Qwen's encoder, and a picture that always has about 1 MP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import LongCatImageEditPipeline
from diffusers.models.transformers.transformer_longcat_image import (
    LongCatImageAttention,
    LongCatImageAttnProcessor,
    LongCatImageSingleTransformerBlock,
)
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as edit
from diffusers.pipelines.longcat_image.pipeline_output import LongCatImagePipelineOutput
from PIL import Image
from torch import Tensor

from ...config import SpecEditConfig
from ...layout import MixedLayout, TokenGrid
from ...method.adapter import EditState, Run
from ...released import Released
from ..attention.contexts import Context
from ..attention.last_block import FluxLastBlock
from ..attention.processors import FluxMixedProcessor, why_unsupported_processor
from ..registry import register_adapter
from ..shared.block_adapter import GIVEN_SIGMAS, pixels_per_token
from ..shared.conditioning import PromptConditioning
from ..shared.devices import execution_device
from ..shared.flux_blocks import MODULATED, FluxBlocks, FluxForward, FluxPrompt, image_ids
from ..shared.images import check_pictures, source_pictures, too_small
from ..shared.modulation import ModulationLayers
from ..shared.prompts import broadcast_negative_prompt
from ..shared.shapes import shapes_of
from . import positions

EDIT_AREA = 1024 * 1024
LATENT_CHANNELS = 16  # a constant of the stock pipeline


class LongCatMixedProcessor(FluxMixedProcessor):
    """FLUX's attention, with the context that travels with the rotary tables."""

    stock = LongCatImageAttnProcessor

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple | None = None,
        rows: slice | None = None,
    ):
        rotary, context = positions.split(image_rotary_emb)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary, context, rows)


class LongCatLastBlock(FluxLastBlock):
    """FLUX's last block, with the context that travels with the rotary tables."""

    def context(self, kwargs: dict[str, Any] | None, rotary: tuple | None) -> Context | None:
        return positions.split(rotary)[1]


@dataclass(kw_only=True)
class LongCatConditioning(PromptConditioning[FluxPrompt]):
    """Nothing but the prompts: the transformer takes no guidance and no pooled embedding."""


@register_adapter
class LongCatImageEdit(FluxBlocks):
    """Adapter of LongCatImageEditPipeline."""

    name = "longcat-image-edit"
    pipelines = "LongCatImageEditPipeline"
    released = (Released("longcat-image-edit", "LongCat-Image-Edit", ("longcat-image-edit",)),)
    attention = LongCatImageAttention
    processor = LongCatMixedProcessor
    block = LongCatImageSingleTransformerBlock
    trimmed = LongCatLastBlock
    decodes_boxes = True
    pos_embed_hook = positions.ContextHook
    modulation_layers = ModulationLayers("time_embed", blocks=MODULATED)
    take_context = staticmethod(positions.take)
    drop_context = staticmethod(positions.drop)

    @staticmethod
    def matches(pipe: Any) -> bool:
        return isinstance(pipe, LongCatImageEditPipeline)

    def refusal(self, pipe: Any, call: dict[str, Any], attention: str) -> str | None:
        if (reason := why_unsupported_processor(pipe.transformer, LongCatImageAttention, None)) is not None:
            return reason
        if call.get("sigmas") is not None:
            return GIVEN_SIGMAS
        if call.get("prompt") is None:
            return "the stock pipeline cannot do without a prompt"
        return too_small([picture_size(check_pictures(call["image"]))], pixels_per_token(pipe))

    def prepare(self, pipe: Any, call: dict[str, Any], config: SpecEditConfig) -> EditState:
        images = check_pictures(call["image"])
        height, width = picture_size(images)
        pipe.check_inputs(
            call["prompt"], height, width, negative_prompt=call["negative_prompt"],
            prompt_embeds=call["prompt_embeds"], negative_prompt_embeds=call["negative_prompt_embeds"],
        )  # fmt: skip
        self.start_call(pipe, call, _joint_attention_kwargs=call["joint_attention_kwargs"] or {})
        resized, condition = [pipe.image_processor.resize(image, height, width) for image in images], images
        if not isinstance(call["image"], list):  # the encoder sees a list's picture as it is, in the stock pipeline too
            condition = [pipe.image_processor.resize(image, height // 2, width // 2) for image in resized]
        positive, negative = encode(pipe, call, condition)
        batch, length = positive.embeds.shape[:2]
        latents = pipe.prepare_latents(
            pipe.image_processor.preprocess(resized, height, width), batch, LATENT_CHANNELS, height, width,
            positive.embeds.dtype, length, execution_device(pipe), call["generator"], call["latents"],
        )[:2]  # fmt: skip
        multiple = pixels_per_token(pipe)
        grid = TokenGrid(height // multiple, width // multiple)
        conditioning = LongCatConditioning(
            positive=positive, negative=negative, scale=call["guidance_scale"], dtype=positive.embeds.dtype,
            source=source_pictures(pipe, images, height, width).repeat(batch, 1, 1, 1),
        )  # fmt: skip
        return self.edit_state(pipe, call, config, conditioning, latents, (grid, grid), text_tokens=length)

    def call_size(self, pipe: Any, picture: Any) -> dict[str, Any]:
        shapes_of(picture)  # the output always has the size at which the picture is taken
        return {}

    def taken_size(self, pipe: Any, picture: Any) -> tuple[int, int]:
        return picture_size([picture])

    @staticmethod
    def position_ids(
        state: EditState, layout: MixedLayout, reference_layout: MixedLayout, scale: float = 1.0
    ) -> Tensor:
        # Images begin where the text ends, on both axes: the same number at every resolution.
        start = torch.tensor([0.0, state.text_tokens, state.text_tokens], device=state.device)
        parts = enumerate((layout, reference_layout), start=1)
        return torch.cat([image_ids(part.positions.to(start) * scale, i) + start for i, part in parts])

    def forward(self, run: Run, prompt: FluxPrompt, inputs: FluxForward) -> Tensor:
        ids, context = inputs.ids, inputs.context
        return run.pipe.transformer(
            hidden_states=inputs.states, timestep=inputs.timestep, guidance=None, encoder_hidden_states=inputs.text,
            txt_ids=inputs.text_ids, img_ids=ids if context is None else positions.PlacedIds(ids, context),
            return_dict=False,
        )[0]  # fmt: skip

    @staticmethod
    def output(images: Any) -> LongCatImagePipelineOutput:
        return LongCatImagePipelineOutput(images=images)


def picture_size(images: list[Image.Image]) -> tuple[int, int]:
    """Height and width of the picture as the model takes it, and of the output."""
    if len(images) > 1:
        raise ValueError(f"image: expected one picture a call for LongCatImageEditPipeline, got {len(images)}")
    width, height = edit.calculate_dimensions(EDIT_AREA, images[0].width / images[0].height)[:2]
    return height, width


def encode(pipe: Any, call: dict[str, Any], condition: list[Image.Image]) -> tuple[FluxPrompt, FluxPrompt | None]:
    """The prompt with the picture, and under guidance the negative one."""

    def one(prompt: Any, given: Tensor | None = None) -> FluxPrompt:
        images = call["num_images_per_prompt"]
        return FluxPrompt(
            *pipe.encode_prompt(prompt=prompt, image=condition, num_images_per_prompt=images, prompt_embeds=given)
        )

    positive = one(call["prompt"])
    if not call["guidance_scale"] > 1:  # not what the pipeline keeps, which another thread's call may have replaced
        return positive, None
    call = broadcast_negative_prompt(call | {"negative_prompt": call["negative_prompt"] or ""})
    negative = one(call["negative_prompt"], call["negative_prompt_embeds"])
    if (got := negative.embeds.shape) != positive.embeds.shape:
        expected = tuple(positive.embeds.shape)
        raise ValueError(f"negative_prompt_embeds: expected shape {expected}, as the prompt's, got {tuple(got)}")
    return positive, negative
