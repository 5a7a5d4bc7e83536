"""Qwen-Image-Edit and its Plus variant (2509, 2511): how a call becomes an EditState, and what the sampler asks."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from typing import Any

from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from diffusers.pipelines.qwenimage.pipeline_output import QwenImagePipelineOutput
from PIL import Image
from torch import Tensor

from ...config import SpecEditConfig
from ...forecast.toca import PartialForward
from ...layout import GridSet, TokenGrid
from ...method.adapter import EditState, LayoutGroup, Run, active_branches, place_references
from ...once import warn_once
from ...released import Released
from ..attention import compiled
from ..attention.last_block import QwenLastBlock
from ..attention.processors import QwenMixedProcessor, why_unsupported_processor
from ..registry import register_adapter
from ..shared import decode_boxes
from ..shared.block_adapter import GIVEN_SIGMAS, pixels_per_token
from ..shared.devices import execution_device
from ..shared.images import check_pictures, decoder_features, source_pictures, too_small
from ..shared.modulation import ModulationLayers
from ..shared.prompts import count_prompts, warn_if_guidance_inactive
from ..shared.shapes import Shape, shapes_of, whole
from ..shared.single_frame_adapter import SingleFrameAdapter
from ..shared.single_frame_vae import single_frame
from .forward import QwenForward, guided
from .positions import FrequenciesHook, reference_offset
from .prompts import QwenConditioning, encode, text_counts
from .sizes import Pictures, edit_size, nearest_shapes, picture_size, shrink_picture, whole_tokens

logger = logging.getLogger("specedit")
# Configurations whose transformer takes more than the edit pipelines give it.
UNUSUAL = {
    "guidance_embeds": "the transformer is guidance-distilled",
    "use_additional_t_cond": "the transformer takes another condition beside the timestep",
    "use_layer3d_rope": "the transformer places layers, not reference pictures",
}


@register_adapter
class QwenImageEdit(SingleFrameAdapter):
    """Adapter of QwenImageEditPipeline."""

    name = "qwen-image-edit"
    pipelines = "QwenImageEditPipeline"
    released = (
        Released("qwen-image-edit", "Qwen-Image-Edit, 2509, 2511", ("qwen-image-edit",), guided_by_prompt=True),
    )
    keeps_reference = True
    skips_blocks = True
    skips_tokens = True
    decodes_boxes = True
    measures_attention = True
    attention = Attention
    processor = QwenMixedProcessor
    block = QwenImageTransformerBlock
    blocks = "transformer_blocks"
    trimmed = QwenLastBlock
    pos_embed_hook = FrequenciesHook
    modulation_layers = ModulationLayers(
        "time_text_embed", blocks={"transformer_blocks": ("img_mod.1", "txt_mod.1")}, factor=1.0
    )

    @staticmethod
    def matches(pipe: Any) -> bool:
        return isinstance(pipe, QwenImageEditPipeline)

    def refusal(self, pipe: Any, call: dict[str, Any], attention: str) -> str | None:
        # With "stock" too, mixed stages need a processor that takes a bias per key.
        if (reason := why_unsupported_processor(pipe.transformer, Attention, None)) is not None:
            return reason
        for option, reason in UNUSUAL.items():
            if getattr(pipe.transformer.config, option, False):  # older versions do not have every option
                return reason
        if call.get("sigmas") is not None:
            return GIVEN_SIGMAS
        images, multiple = check_pictures(call["image"]), pixels_per_token(pipe)
        sizes = [self._output_size(pipe, call, images, multiple), *self._reference_sizes(pipe, images)]
        return too_small(sizes, multiple)

    # ------------------------------------------------------------------------------------------------- prepare

    def prepare(self, pipe: Any, call: dict[str, Any], config: SpecEditConfig) -> EditState:
        images = check_pictures(call["image"])
        multiple = pixels_per_token(pipe)
        height, width = self._output_size(pipe, call, images, multiple)
        known = inspect.signature(pipe.check_inputs).parameters
        pipe.check_inputs(**{name: call[name] for name in known if name in call} | dict(height=height, width=width))
        self._check_batch(call, images)
        self.start_call(pipe, call, _attention_kwargs=call["attention_kwargs"] or {})
        grid = TokenGrid(height // multiple, width // multiple)
        pictures = self._pictures(pipe, call, images, grid)
        warn_if_guidance_inactive(pipe, call)
        positive, negative = encode(pipe, call, pictures.condition, execution_device(pipe))
        batch, dtype = len(positive.embeds), positive.embeds.dtype
        with single_frame(pipe.vae):
            latents = self._latents(pipe, call, pictures, (batch, height, width), positive.embeds)
        grids = GridSet(tuple(TokenGrid(*(side // multiple for side in p.shape[-2:])) for p in pictures.reference))
        placements = place_references(self, pipe, grid, grids)
        taken = pictures.reference[pictures.aligned].shape[-2:]
        source = source_pictures(pipe, self._edited(images, pictures.aligned), *taken)
        source = placements[pictures.aligned].place_pixels(source, multiple)
        conditioning = QwenConditioning(
            positive=positive, negative=negative, scale=call["true_cfg_scale"], dtype=dtype,
            source=source.repeat(batch // len(source), 1, 1, 1), call=call, condition=pictures.condition,
            kwargs=call["attention_kwargs"] or {},
        )  # fmt: skip
        return self.edit_state(
            pipe, call, config, conditioning, latents, (grid, grids.grids[0] if len(grids.grids) == 1 else grids),
            placements=placements, edited=pictures.aligned, pictures=len(source),
            **text_counts(positive, negative, config.attention),
        )  # fmt: skip

    @staticmethod
    def _latents(
        pipe: Any, call: dict[str, Any], pictures: Pictures, shape: tuple[int, int, int], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The call's noise and the references' latents, packed (B, n, C), with the dtype and on the device of `like`.

        shape: B, height and width of the output.
        """
        latents: tuple[Tensor, Tensor] = pipe.prepare_latents(
            pictures.reference if len(pictures.reference) > 1 else pictures.reference[0], shape[0],
            pipe.transformer.config.in_channels // 4, *shape[1:], like.dtype, like.device, call["generator"],
            call["latents"],
        )  # fmt: skip
        return latents

    @staticmethod
    def _output_size(pipe: Any, call: dict[str, Any], images: list[Image.Image], multiple: int) -> tuple[int, int]:
        width, height = picture_size(pipe, images[0])
        return whole_tokens(call, height, width, multiple)

    @staticmethod
    def _reference_sizes(pipe: Any, images: list[Image.Image]) -> list[tuple[int, int]]:
        """Height and width at which the transformer sees each reference."""
        return [picture_size(pipe, images[0])[::-1]]

    @staticmethod
    def _check_batch(call: dict[str, Any], images: list[Image.Image]) -> None:
        prompts = count_prompts(call)
        total = prompts * call["num_images_per_prompt"]
        if len(images) > total or total % len(images):
            raise ValueError(f"image: expected one picture or as many as fit {total} edits, got {len(images)}")

    @staticmethod
    def _pictures(pipe: Any, call: dict[str, Any], images: list[Image.Image], grid: TokenGrid) -> Pictures:
        """Every picture of the batch at the size of the first one. The encoder sees a list's pictures as they are, even
        of one, as in the stock pipeline."""
        width, height = picture_size(pipe, images[0])
        resized = [pipe.image_processor.resize(image, height, width) for image in images]
        reference = pipe.image_processor.preprocess(resized, height, width).unsqueeze(2)
        return Pictures(images if isinstance(call["image"], list) else resized, [reference])

    @staticmethod
    def _edited(images: list[Image.Image], aligned: int) -> list[Image.Image]:
        """The pictures being edited, one for each sample."""
        return images

    def reference_offset(self, pipe: Any, output: TokenGrid, reference: TokenGrid) -> tuple[int, int]:
        return reference_offset(output, reference, pipe.transformer.pos_embed.scale_rope)

    def call_size(self, pipe: Any, picture: Any) -> dict[str, Any]:
        height, width = whole(Shape(*picture_size(pipe, shapes_of(picture)[0])), pixels_per_token(pipe))
        return dict(height=height, width=width)

    def draft_state(self, run: Run) -> EditState:
        """A draft is a small image of its own, whose text may describe a smaller picture."""
        state, config, conditioning = run.state, run.config, run.state.conditioning
        call = conditioning.call
        if config.draft_condition == "full" or call["prompt"] is None:  # given embeddings cannot be encoded again
            return state
        condition = [shrink_picture(image, config.draft_scale) for image in conditioning.condition]
        call = call if call["negative_prompt"] is not None else call | {"true_cfg_scale": 1.0}
        positive, negative = encode(run.pipe, call, condition, state.device)
        if conditioning.negative is None or negative is None:
            negative = conditioning.negative
        small = dataclasses.replace(conditioning, positive=positive, negative=negative)
        return dataclasses.replace(state, conditioning=small, **text_counts(positive, negative, config.attention))

    # ------------------------------------------------------------------------------------------------ velocity

    def predict(
        self, run: Run, group: LayoutGroup, sigma: float, partial: list[PartialForward] | None = None
    ) -> list[Tensor]:
        prompts = run.state.conditioning.prompts(active_branches(run.state, run.config, sigma))
        forward, attention = QwenForward(run, group, sigma), run.config.attention
        unpadded = all(prompt.lengths is None for prompt in prompts)
        own = forward.mixed or bool(partial) or group.blocks is not None or group.mass is not None
        plain = attention == "auto" and not own and unpadded
        if attention == "stock":
            return [forward.dense(prompt) for prompt in prompts]
        if plain and len(prompts) == 1:
            return [forward.dense(prompts[0])]
        return forward.packed(prompts, partial[0] if partial else None)  # one pass, one KV cache

    def guide(self, run: Run, outputs: list[Tensor]) -> Tensor:
        return outputs[0] if len(outputs) == 1 else guided(*outputs, run.state.conditioning.scale)

    # --------------------------------------------------------------------------------------- features and images

    def features(self, pipe: Any, tokens: Tensor, grid: TokenGrid) -> list[Tensor]:
        # One frame needs none of the decoder's cache of earlier frames.
        with single_frame(pipe.vae):
            return [part[:, :, 0] for part in decoder_features(pipe.vae, self.latents_of(pipe, tokens, grid))]

    def decode_edited(
        self, pipe: Any, state: EditState, tokens: Tensor, output_type: str, cells: Tensor
    ) -> tuple[Any, float]:
        latents, cell = self.latents_of(pipe, tokens, state.grid), 2 * state.grid.geometry.patch
        with single_frame(pipe.vae):
            part = decode_boxes.decoded_part(pipe.vae, latents, cells, cell)
        if part is not None:
            return pipe.image_processor.postprocess(part[0], output_type=output_type), part[1]
        return self.decode(pipe, state, tokens, output_type), 1.0

    @staticmethod
    def unpacked(pipe: Any, tokens: Tensor, grid: TokenGrid) -> Tensor:
        side = pixels_per_token(pipe)
        latents: Tensor = pipe._unpack_latents(tokens, grid.height * side, grid.width * side, pipe.vae_scale_factor)
        return latents

    @staticmethod
    def output(images: Any) -> QwenImagePipelineOutput:
        return QwenImagePipelineOutput(images=images)

    @staticmethod
    def drop_context(kwargs: dict[str, Any]) -> dict[str, Any]:
        return compiled.drop_keyword(kwargs, nothing={})


@register_adapter
class QwenImageEditPlus(QwenImageEdit):
    """Adapter of QwenImageEditPlusPipeline: one prompt, any number of references of different sizes.

    The output is aligned with the reference whose aspect ratio is nearest to its own; of several, with the last one,
    because that is where the pipeline takes the output's size from. Only that one can serve verification and restoring.
    """

    name = "qwen-image-edit-plus"
    pipelines = "QwenImageEditPlusPipeline"

    @staticmethod
    def matches(pipe: Any) -> bool:
        return isinstance(pipe, QwenImageEditPlusPipeline)

    def refusal(self, pipe: Any, call: dict[str, Any], attention: str) -> str | None:
        prompts = call["prompt"] if isinstance(call["prompt"], list) else call["prompt_embeds"]
        if prompts is not None and len(prompts) > 1:  # what becomes of them is for each version's own call to say
            return f"{len(prompts)} prompts in one call, and the pipeline takes one"
        return super().refusal(pipe, call, attention)

    @staticmethod
    def _output_size(pipe: Any, call: dict[str, Any], images: list[Image.Image], multiple: int) -> tuple[int, int]:
        width, height = edit_size(plus, images[-1])
        return whole_tokens(call, height, width, multiple)

    @staticmethod
    def _reference_sizes(pipe: Any, images: list[Image.Image]) -> list[tuple[int, int]]:
        return [edit_size(plus, image, plus.VAE_IMAGE_SIZE)[::-1] for image in images]

    @staticmethod
    def _check_batch(call: dict[str, Any], images: list[Image.Image]) -> None:
        """One prompt has any number of pictures."""

    @staticmethod
    def _pictures(pipe: Any, call: dict[str, Any], images: list[Image.Image], grid: TokenGrid) -> Pictures:
        condition, reference = [], []
        for image in images:
            width, height = edit_size(plus, image, plus.CONDITION_IMAGE_SIZE)
            condition.append(pipe.image_processor.resize(image, height, width))
            width, height = edit_size(plus, image, plus.VAE_IMAGE_SIZE)
            reference.append(pipe.image_processor.preprocess(image, height, width).unsqueeze(2))
        alike = nearest_shapes([tuple(r.shape[-2:]) for r in reference], grid)
        if len(alike) > 1:
            names = ", ".join(str(i + 1) for i in alike)
            text = f"pictures {names} have one shape; SpecEdit takes the last of them for the one being edited"
            warn_once(pipe, text, "pictures of one shape", logger.warning)
        return Pictures(condition, reference, alike[-1])

    @staticmethod
    def _edited(images: list[Image.Image], aligned: int) -> list[Image.Image]:
        return [images[aligned]]

    def call_size(self, pipe: Any, picture: Any) -> dict[str, Any]:
        shape = Shape(*edit_size(plus, shapes_of(picture)[-1], plus.VAE_IMAGE_SIZE))
        height, width = whole(shape, pixels_per_token(pipe))
        return dict(height=height, width=width)
