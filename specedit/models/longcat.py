"""LongCat-Image-Edit: FLUX's blocks and autoencoder, Qwen's encoder, and a picture that always has about 1 MP."""

from __future__ import annotations

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
from torch import Tensor

from ..config import SpecEditConfig
from ..layout import TokenGrid
from ..method.adapter import EditState, Run
from . import longcat_positions
from .attention import compiled, last_block
from .attention import contexts as joint
from .attention import processors as attention
from .flux import FluxKontext, position_ids
from .qwen import positions as qwen_positions
from .shared.images import check_pictures, source_pictures, too_small
from .shared.prompts import broadcast_negative_prompt, count_prompts
from .shared.shapes import shapes_of

EDIT_AREA = 1024 * 1024
LATENT_CHANNELS = 16  # a constant of the stock pipeline


class LongCatMixedProcessor(attention.FluxMixedProcessor):
    """FLUX's attention, with the context that travels beside the rotary tables."""

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
        rotary, context = longcat_positions.split(image_rotary_emb)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary, context, rows)


class LongCatLastBlock(last_block.FluxLastBlock):
    """FLUX's last block, with the context that travels beside the rotary tables."""

    def context(self, kwargs: dict[str, Any] | None, rotary: tuple | None) -> joint.MixedContext | None:
        return longcat_positions.split(rotary)[1]


class LongCatImageEdit(FluxKontext):
    """Adapter of LongCatImageEditPipeline."""

    name = "longcat-image-edit"
    pipelines = "LongCatImageEditPipeline"

    @staticmethod
    def matches(pipe: Any) -> bool:
        return isinstance(pipe, LongCatImageEditPipeline)

    def refusal(self, pipe: Any, call: dict[str, Any], backend: str) -> str | None:
        if (reason := attention.why_unsupported_processor(pipe.transformer, LongCatImageAttention, None)) is not None:
            return reason
        if call.get("sigmas") is not None:
            return "sigmas were given, and SpecEdit's stages choose their own"
        if call.get("prompt") is None:
            return "the stock pipeline cannot do without a prompt"
        return too_small([self._picture_size(call)], pipe.vae_scale_factor * 2)

    @staticmethod
    def _picture_size(call: dict[str, Any]) -> tuple[int, int]:
        """Height and width of the picture as the model takes it, and of the output."""
        images = check_pictures(call["image"])
        if len(images) > 1:
            raise ValueError(f"image: expected one picture a call for LongCatImageEditPipeline, got {len(images)}")
        width, height = edit.calculate_dimensions(EDIT_AREA, images[0].width / images[0].height)[:2]
        return height, width

    def prepare(self, pipe: Any, call: dict[str, Any], config: SpecEditConfig) -> EditState:
        images = check_pictures(call["image"])
        height, width = self._picture_size(call)
        pipe.check_inputs(
            call["prompt"], height, width, negative_prompt=call["negative_prompt"],
            prompt_embeds=call["prompt_embeds"], negative_prompt_embeds=call["negative_prompt_embeds"],
        )  # fmt: skip
        pipe._guidance_scale = call["guidance_scale"]
        pipe._joint_attention_kwargs = call["joint_attention_kwargs"] or {}
        pipe._current_timestep = None
        pipe._interrupt = False
        resized = pipe.image_processor.resize(call["image"], height, width)  # which leaves a list as it is
        condition = pipe.image_processor.resize(resized, height // 2, width // 2)

        def encode(prompt: Any, given: Tensor | None = None) -> dict[str, Tensor]:
            embeds, ids = pipe.encode_prompt(
                prompt=prompt, image=condition, num_images_per_prompt=call["num_images_per_prompt"], prompt_embeds=given
            )
            return dict(encoder_hidden_states=embeds, txt_ids=ids)

        positive = encode(call["prompt"])
        guided = broadcast_negative_prompt(call | {"negative_prompt": call["negative_prompt"] or ""})
        negative = None
        if call["guidance_scale"] > 1:  # not what the pipeline keeps, which another thread's call may have replaced
            negative = encode(guided["negative_prompt"], call["negative_prompt_embeds"])
        embeds = positive["encoder_hidden_states"]
        batch, length = embeds.shape[:2]
        if negative is not None and (got := negative["encoder_hidden_states"].shape) != embeds.shape:
            expected = tuple(embeds.shape)
            raise ValueError(f"negative_prompt_embeds: expected shape {expected}, as the prompt's, got {tuple(got)}")
        pixels = pipe.image_processor.preprocess(resized, height, width)
        noise, reference, _, _ = pipe.prepare_latents(
            pixels, batch, LATENT_CHANNELS, height, width, embeds.dtype, length, pipe._execution_device,
            call["generator"], call["latents"],
        )  # fmt: skip
        multiple = pipe.vae_scale_factor * 2
        grid = TokenGrid(height // multiple, width // multiple)
        if tuple(noise.shape) != (expected := (batch, grid.tokens, 4 * LATENT_CHANNELS)):
            raise ValueError(f"latents: expected shape {expected}, got {tuple(noise.shape)}")
        return EditState(
            grid=grid,
            noise=noise.float(),
            reference=reference.float(),
            reference_grid=grid,
            generator=call["generator"],
            text_tokens=length,
            branches=1 if negative is None else 2,
            prompts=count_prompts(call),
            pixels_per_token=multiple,
            backend={"auto": None, "stock": "torch"}.get(config.attention, config.attention),
            last_block=self._trims(pipe, config.attention),
            extra=dict(
                positive=positive, negative=negative, dtype=embeds.dtype, scale=call["guidance_scale"],
                source=source_pictures(pipe, images, height, width).repeat(batch, 1, 1, 1),
            ),
        )  # fmt: skip

    def call_size(self, pipe: Any, picture: Any) -> dict[str, Any]:
        shapes_of(picture)  # the output always has the size at which the picture is taken
        return {}

    @staticmethod
    def _forward(pipe, state, prompt, rows, states, ids, words, text_ids, timestep, kwargs) -> Tensor:
        context = kwargs.get("specedit")
        return pipe.transformer(
            hidden_states=states, timestep=timestep, guidance=None, encoder_hidden_states=words, txt_ids=text_ids,
            img_ids=ids if context is None else longcat_positions.PlacedIds(ids, context), return_dict=False,
        )[0]  # fmt: skip

    @staticmethod
    def _ids(state: EditState, layout, reference_layout, scale: float = 1.0) -> Tensor:
        # Images begin where the text ends, on both axes: the same number at every resolution.
        start = torch.tensor([0.0, state.text_tokens, state.text_tokens], device=state.device)
        parts = enumerate((layout, reference_layout), start=1)
        return torch.cat([position_ids(part.positions.to(start) * scale, i) + start for i, part in parts])

    @staticmethod
    def _attention_kwargs(context: joint.MixedContext, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        return {"specedit": context}  # a bias too: these blocks hand no mask down

    def guide(self, run: Run, outputs: list[Tensor]) -> Tensor:
        if len(outputs) == 1:
            return outputs[0]
        positive, negative = outputs
        return negative + run.state.extra["scale"] * (positive - negative)

    @staticmethod
    def output(images: Any) -> LongCatImagePipelineOutput:
        return LongCatImagePipelineOutput(images=images)

    def attach(self, pipe: Any) -> None:
        attention.attach(pipe.transformer, LongCatImageAttention, LongCatMixedProcessor)
        if hasattr(pipe.transformer, "pos_embed"):  # another engine, which runs the stock path, may have none
            qwen_positions.attach(pipe.transformer.pos_embed, longcat_positions.ContextHook)
        last_block.attach(self._last(pipe), LongCatImageSingleTransformerBlock, LongCatLastBlock)
        compiled.attach(pipe.transformer, longcat_positions.take, longcat_positions.drop, self._last(pipe))

    def detach(self, pipe: Any) -> None:
        attention.detach(pipe.transformer, LongCatImageAttention)
        if hasattr(pipe.transformer, "pos_embed"):
            qwen_positions.detach(pipe.transformer.pos_embed)
        last_block.detach(self._last(pipe))
        compiled.detach(pipe.transformer)
