"""Qwen-Image-Edit and its Plus variant (2509, 2511): how a call becomes an EditState, and what the sampler asks."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from diffusers.pipelines.qwenimage.pipeline_output import QwenImagePipelineOutput
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from ...layout import GridSet, TokenGrid
from ...method.adapter import EditState, active_branches, place_references
from ...once import warn_once
from ..attention import compiled, last_block
from ..attention import processors as attention
from ..shared.images import check_pictures, decoder_features, source_pictures, too_small
from ..shared.prompts import broadcast_negative_prompt, count_prompts
from ..shared.shapes import Shape, shapes_of, whole
from ..shared.single_frame_vae import single_frame
from . import positions as qwen_positions
from .forward import QwenForward, guided

logger = logging.get_logger(__name__)
EDIT_AREA = 1024 * 1024  # px to which QwenImageEditPipeline brings every picture
VISION_TOKEN = 28  # px a side of what the vision-language encoder makes one token
# Configurations whose transformer takes more than the edit pipelines give it.
UNUSUAL = {
    "guidance_embeds": "the transformer is guidance-distilled",
    "use_additional_t_cond": "the transformer takes another condition beside the timestep",
    "use_layer3d_rope": "the transformer places layers, not reference pictures",
}


@dataclass(frozen=True)
class Pictures:
    """The input pictures at the sizes that the pipeline takes them.

    condition: what the vision-language encoder sees. reference: one (n, 3, 1, H, W) for each reference, for the VAE.
    aligned: which reference is the picture being edited.
    """

    condition: Any
    reference: list[Tensor]
    aligned: int = 0


class QwenImageEdit:
    """Adapter of QwenImageEditPipeline."""

    name = "qwen-image-edit"
    token_wise = False
    keeps_reference = True
    pipelines = "QwenImageEditPipeline"

    @staticmethod
    def matches(pipe: Any) -> bool:
        return isinstance(pipe, QwenImageEditPipeline)

    def refusal(self, pipe: Any, call: dict[str, Any], backend: str) -> str | None:
        # With "stock" too, mixed stages need a processor that takes a bias per key.
        if (reason := attention.why_unsupported_processor(pipe.transformer, Attention, None)) is not None:
            return reason
        for option, reason in UNUSUAL.items():
            if getattr(pipe.transformer.config, option, False):  # older versions do not have every option
                return reason
        if call.get("sigmas") is not None:
            return "sigmas were given, and SpecEdit's stages choose their own"
        images, multiple = check_pictures(call["image"]), pipe.vae_scale_factor * 2
        sizes = [self._output_size(pipe, call, images, multiple), *self._reference_sizes(pipe, images)]
        return too_small(sizes, multiple)

    # ------------------------------------------------------------------------------------------------- prepare

    def prepare(self, pipe: Any, call: dict[str, Any], attention: str) -> EditState:
        images = check_pictures(call["image"])
        multiple = pipe.vae_scale_factor * 2
        height, width = self._output_size(pipe, call, images, multiple)
        pipe.check_inputs(
            call["prompt"], height, width, negative_prompt=call["negative_prompt"],
            prompt_embeds=call["prompt_embeds"], negative_prompt_embeds=call["negative_prompt_embeds"],
            prompt_embeds_mask=call["prompt_embeds_mask"],
            negative_prompt_embeds_mask=call["negative_prompt_embeds_mask"],
            callback_on_step_end_tensor_inputs=call["callback_on_step_end_tensor_inputs"],
            max_sequence_length=call["max_sequence_length"],
        )  # fmt: skip
        self._check_batch(call, images)
        pipe._guidance_scale = call["guidance_scale"]
        pipe._attention_kwargs = call["attention_kwargs"] or {}
        pipe._current_timestep = None
        pipe._interrupt = False
        device = pipe._execution_device
        grid = TokenGrid(height // multiple, width // multiple)
        pictures = self._pictures(pipe, call, images, grid)
        warn_if_guidance_inactive(pipe, call)
        positive, negative = encode(pipe, call, pictures.condition, device)
        batch, dtype = positive["encoder_hidden_states"].shape[0], positive["encoder_hidden_states"].dtype
        with single_frame(pipe.vae):
            noise, reference = pipe.prepare_latents(
                pictures.reference if len(pictures.reference) > 1 else pictures.reference[0], batch,
                pipe.transformer.config.in_channels // 4, height, width, dtype, device, call["generator"],
                call["latents"],
            )  # fmt: skip
        expected = (batch, grid.tokens, pipe.transformer.config.in_channels)
        if noise.shape != expected:
            raise ValueError(f"latents: expected shape {expected}, got {tuple(noise.shape)}")
        grids = GridSet(tuple(TokenGrid(*(side // multiple for side in p.shape[-2:])) for p in pictures.reference))
        placements = place_references(self, pipe, grid, grids)
        taken = pictures.reference[pictures.aligned].shape[-2:]
        source = source_pictures(pipe, self._edited(images, pictures.aligned), *taken)
        source = placements[pictures.aligned].place_pixels(source, multiple)
        return EditState(
            grid=grid,
            noise=noise.float(),
            reference=reference.float(),
            reference_grid=grids.grids[0] if len(grids.grids) == 1 else grids,
            placements=placements,
            edited=pictures.aligned,
            generator=call["generator"],
            **text_counts(positive, negative, attention),
            branches=1 if negative is None else 2,
            pixels_per_token=multiple,
            backend={"auto": None, "stock": "torch"}.get(attention, attention),
            prompts=count_prompts(call),
            pictures=len(source),
            last_block=attention != "stock" and last_block.trims(self._last(pipe)),
            extra=dict(
                positive=positive, negative=negative, dtype=dtype, call=call, condition=pictures.condition,
                true_cfg_scale=call["true_cfg_scale"], kwargs=call["attention_kwargs"] or {},
                source=source.repeat(batch // len(source), 1, 1, 1),
            ),
        )  # fmt: skip

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
        """Every picture of the batch at the size of the first one; a list's reach the vision-language encoder as they
        are, even of one, since that is what `resize` does to lists."""
        width, height = picture_size(pipe, images[0])
        resized = pipe.image_processor.resize(call["image"], height, width)
        return Pictures(resized, [pipe.image_processor.preprocess(resized, height, width).unsqueeze(2)])

    @staticmethod
    def _edited(images: list[Image.Image], aligned: int) -> list[Image.Image]:
        """The pictures being edited, one for each sample."""
        return images

    def reference_offset(self, pipe: Any, output: TokenGrid, reference: TokenGrid) -> tuple[int, int]:
        return qwen_positions.reference_offset(output, reference, pipe.transformer.pos_embed.scale_rope)

    def call_size(self, pipe: Any, picture: Any) -> dict[str, Any]:
        height, width = whole(Shape(*picture_size(pipe, shapes_of(picture)[0])), pipe.vae_scale_factor * 2)
        return dict(height=height, width=width)

    def draft_state(self, pipe: Any, state: EditState, config: Any) -> EditState:
        """A draft is a small image of its own, whose text may describe a smaller picture."""
        scale, call = config.draft_scale, state.extra["call"]
        extra = state.extra | {"sequences": {}}
        if config.draft_condition == "full" or call["prompt"] is None:  # embeddings that were given cannot be made anew
            return dataclasses.replace(state, extra=extra)
        given = state.extra["condition"]
        less = [shrink_picture(one, scale) for one in (given if isinstance(given, list) else [given])]
        small_call = call if call["negative_prompt"] is not None else call | {"true_cfg_scale": 1.0}
        positive, negative = encode(pipe, small_call, less if isinstance(given, list) else less[0], state.device)
        if state.extra["negative"] is None or negative is None:
            negative = state.extra["negative"]
        extra |= {"positive": positive, "negative": negative}
        return dataclasses.replace(state, extra=extra, **text_counts(positive, negative, config.attention))

    # ------------------------------------------------------------------------------------------------ velocity

    def velocity(self, pipe, state, tokens, sigma, rows, layout, reference, reference_layout, config) -> Tensor:
        outputs = self.branches(pipe, state, tokens, sigma, rows, layout, reference, reference_layout, config)
        return self.guide(state, outputs)

    def branches(
        self, pipe, state, tokens, sigma, rows, layout, reference, reference_layout, config, calls=None
    ) -> list[Tensor]:
        prompts = [state.extra["positive"], state.extra["negative"]][: active_branches(state, config, sigma)]
        inputs = QwenForward(pipe, state, tokens, reference, sigma, rows, layout, reference_layout, config)
        whole = all(p["lengths"] is None for p in prompts)
        plain = config.attention == "auto" and not inputs.mixed and not calls and whole
        if config.attention == "stock":
            return [inputs.dense(prompt) for prompt in prompts]
        if plain and len(prompts) == 1:
            return [inputs.dense(prompts[0])]
        return inputs.packed(prompts, calls[0] if calls else None)  # one pass, one store

    def guide(self, state: EditState, outputs: list[Tensor]) -> Tensor:
        return outputs[0] if len(outputs) == 1 else guided(*outputs, state.extra["true_cfg_scale"])

    # --------------------------------------------------------------------------------------- features and images

    def features(self, pipe: Any, tokens: Tensor, grid: TokenGrid) -> list[Tensor]:
        # One frame needs none of the decoder's cache of earlier frames.
        with single_frame(pipe.vae):
            return [part[:, :, 0] for part in decoder_features(pipe.vae, self._latents(pipe, tokens, grid))]

    def decode(self, pipe: Any, state: EditState, tokens: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return tokens.to(state.extra["dtype"])
        with single_frame(pipe.vae):
            image = pipe.vae.decode(self._latents(pipe, tokens, state.grid), return_dict=False)[0][:, :, 0]
        return pipe.image_processor.postprocess(image, output_type=output_type)

    @staticmethod
    def _latents(pipe: Any, tokens: Tensor, grid: TokenGrid) -> Tensor:
        side, config = pipe.vae_scale_factor * 2, pipe.vae.config
        latents = pipe._unpack_latents(tokens, grid.height * side, grid.width * side, pipe.vae_scale_factor)
        latents = latents.to(pipe.vae.dtype)
        mean, std = (
            torch.tensor(x).view(1, -1, 1, 1, 1).to(latents) for x in (config.latents_mean, config.latents_std)
        )
        return latents * std + mean

    @staticmethod
    def output(images: Any) -> QwenImagePipelineOutput:
        return QwenImagePipelineOutput(images=images)

    # ------------------------------------------------------------------------------------ processors and positions

    def attach(self, pipe: Any) -> None:
        attention.attach(pipe.transformer, Attention, attention.QwenMixedProcessor)
        if (block := self._last(pipe)) is not None:
            qwen_positions.attach(pipe.transformer.pos_embed)
            last_block.attach(block, QwenImageTransformerBlock, last_block.QwenLastBlock)
            drop = partial(compiled.drop_keyword, nothing={})
            compiled.attach(pipe.transformer, compiled.take_keyword, drop, block)

    def detach(self, pipe: Any) -> None:
        attention.detach(pipe.transformer, Attention)
        if (block := self._last(pipe)) is not None:
            qwen_positions.detach(pipe.transformer.pos_embed)
            last_block.detach(block)
            compiled.detach(pipe.transformer)

    @staticmethod
    def _last(pipe: Any) -> torch.nn.Module | None:
        """The last block; None of another engine without the model's parts, which runs the stock path."""
        return last_block.last(pipe.transformer, "transformer_blocks")


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

    def refusal(self, pipe: Any, call: dict[str, Any], backend: str) -> str | None:
        prompts = call["prompt"] if isinstance(call["prompt"], list) else call["prompt_embeds"]
        if prompts is not None and len(prompts) > 1:  # what becomes of them is for each version's own call to say
            return f"{len(prompts)} prompts in one call, and the pipeline takes one"
        return super().refusal(pipe, call, backend)

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
        height, width = whole(shape, pipe.vae_scale_factor * 2)
        return dict(height=height, width=width)


def picture_size(pipe: Any, image: Image.Image | Shape) -> tuple[int, int]:
    """Width and height at which the pipeline takes a picture: a derived pipeline's `picture_size`, else 1 MP."""
    rule = getattr(pipe, "picture_size", None)
    return edit_size(edit, image) if rule is None else rule(image)


def edit_size(module: Any, image: Image.Image | Shape, area: int = EDIT_AREA) -> tuple[int, int]:
    """Width and height of a picture at `area` px, by the rule of the pipeline's module."""
    width, height = module.calculate_dimensions(area, image.width / image.height)[:2]
    if min(width, height) < 1:
        raise ValueError(f"image: expected sides less unequal, got {image.width} x {image.height}")
    return width, height


def whole_tokens(call: dict[str, Any], height: int, width: int, multiple: int) -> tuple[int, int]:
    """The asked height and width, or else the given ones, down to whole tokens."""
    height, width = call["height"] or height, call["width"] or width
    for name, side in (("height", height), ("width", width)):
        if side < multiple:
            raise ValueError(f"{name}: expected at least {multiple} px, got {side}")
    return height // multiple * multiple, width // multiple * multiple


def nearest_shapes(sizes: list[tuple[int, int]], grid: TokenGrid) -> list[int]:
    """Indices of the (height, width) whose aspect ratio is nearest to the grid's, several where these are equal."""
    distance = [abs(math.log(h * grid.width / (w * grid.height))) for h, w in sizes]
    return [i for i, d in enumerate(distance) if d <= min(distance) + 1e-9]


def shrink_picture(image: Image.Image, scale: int) -> Image.Image:
    return image.resize(tuple(max(VISION_TOKEN, side // scale) for side in image.size), Image.Resampling.LANCZOS)


def has_negative(call: dict[str, Any]) -> bool:
    return call["negative_prompt"] is not None or call["negative_prompt_embeds"] is not None


def warn_if_guidance_inactive(pipe: Any, call: dict[str, Any]) -> None:
    """The stock pipelines' warnings, once each, for a call that looks as if it wanted guidance."""
    scale = call["true_cfg_scale"]
    if scale > 1 and not has_negative(call):
        text = f"true_cfg_scale is {scale}, but without a negative_prompt there is no guidance"
        warn_once(pipe, text, "guidance without a negative_prompt", logger.warning)
    elif scale <= 1 and has_negative(call):
        text = f"there is a negative_prompt, but true_cfg_scale is {scale}: there is no guidance"
        warn_once(pipe, text, "a negative_prompt without guidance", logger.warning)


def encode(pipe: Any, call: dict[str, Any], condition: Any, device: torch.device) -> tuple[dict, dict | None]:
    """Both prompts beside the pictures, as the stock pipelines encode them.

    Of each: `encoder_hidden_states` (B, L, D), `mask` (B, L) bool and `lengths`, both None where nothing is padding.
    The images of a prompt stand together. `encode_prompt` itself repeats embeddings so, but masks one prompt after the
    other, and would give a prompt another one's.
    """
    images = call["num_images_per_prompt"]

    def one(prefix: str) -> dict[str, Any]:
        embeds, mask = pipe.encode_prompt(
            image=condition, prompt=call[f"{prefix}prompt"], prompt_embeds=call[f"{prefix}prompt_embeds"],
            prompt_embeds_mask=call[f"{prefix}prompt_embeds_mask"], device=device,
            num_images_per_prompt=1, max_sequence_length=call["max_sequence_length"],
        )  # fmt: skip
        embeds = embeds.to(device).repeat_interleave(images, 0)  # the caller's own stay where they are
        mask = None if mask is None else mask.to(device).repeat_interleave(images, 0)
        mask = None if mask is None or bool(mask.all()) else mask.bool()
        lengths = None if mask is None else mask.sum(1).tolist()
        return dict(encoder_hidden_states=embeds, mask=mask, lengths=lengths)

    if not (call["true_cfg_scale"] > 1 and has_negative(call)):
        return one(""), None
    call = broadcast_negative_prompt(call)
    expected, got = count_prompts(call), count_prompts(call, "negative_")
    if expected != got:
        raise ValueError(f"negative_prompt: expected {expected}, one for each prompt, got {got}")
    return one(""), one("negative_")


def text_counts(positive: dict[str, Any], negative: dict[str, Any] | None, attention: str) -> dict[str, float | None]:
    """Mean text tokens of each branch, as EditState's fields. Stock attention computes the padding too."""

    def mean(prompt: dict[str, Any]) -> float:
        lengths = prompt["lengths"]
        padded = lengths is None or attention == "stock"
        return prompt["encoder_hidden_states"].shape[1] if padded else sum(lengths) / len(lengths)

    return dict(text_tokens=mean(positive), negative_text_tokens=None if negative is None else mean(negative))
