"""Qwen-Image-2.1: how a call becomes an EditState, and what the sampler asks."""

from __future__ import annotations

from typing import Any

from diffusers import QwenImage21Pipeline
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21TransformerBlock
from diffusers.pipelines.qwenimage.pipeline_output import QwenImagePipelineOutput
from PIL import Image
from torch import Tensor

from ...config import SpecEditConfig
from ...forecast.toca import PartialForward
from ...geometry import UNPACKED
from ...layout import GridSet, TokenGrid
from ...method.adapter import EditState, LayoutGroup, Run, active_branches, place_references
from ...released import Released
from ..attention.last_block import LastBlock
from ..attention.processors import why_unsupported_processor
from ..registry import register_adapter
from ..shared.block_adapter import GIVEN_SIGMAS
from ..shared.devices import execution_device
from ..shared.images import decoder_features, source_pictures, too_small
from ..shared.modulation import ModulationLayers
from ..shared.prompts import warn_if_guidance_inactive
from ..shared.shapes import shapes_of
from ..shared.single_frame_adapter import SingleFrameAdapter
from ..shared.single_frame_vae import single_frame
from .attention import ATTENTION, wrap
from .forward import predicted
from .pictures import RESOLUTION, check_pictures, output_size, taken_size
from .positions import PlacedHook, reference_offset
from .prompts import Qwen21Conditioning, encode
from .schedule import own_sigmas, resampled, why_unusable


@register_adapter
class QwenImage21(SingleFrameAdapter):
    """Adapter of QwenImage21Pipeline. The last of several references is the picture being edited.

    Text and references are computed once a run, at full resolution; every step computes the target's tokens alone.
    """

    name = "qwen-image-2.1"
    pipelines = "QwenImage21Pipeline"
    released = (Released("qwen-image-2.1", "Qwen-Image-2.1", ("qwen-image-2.1",)),)
    geometry = UNPACKED
    token_wise = skips_tokens = True
    fixed_prefix = True
    aligns_phases = False
    attention = ATTENTION
    processor = staticmethod(wrap)
    block = QwenImage21TransformerBlock
    blocks = "transformer_blocks"
    trimmed = LastBlock
    pos_embed_hook = PlacedHook
    modulation_layers = ModulationLayers("time_text_embed", ("modulation.1", "norm_out.linear"), factor=1.0)

    @staticmethod
    def matches(pipe: Any) -> bool:
        return isinstance(pipe, QwenImage21Pipeline)

    def last_block(self, pipe: Any) -> None:
        """None: every row is the target's, and is read."""

    @staticmethod
    def take_context(kwargs: dict[str, Any]) -> Any:
        return getattr(kwargs.get("layer_cache"), "context", None)

    def refusal(self, pipe: Any, call: dict[str, Any], attention: str) -> str | None:
        # With "stock" too, coarse tokens need a processor that takes a bias per key.
        if (reason := why_unsupported_processor(pipe.transformer, ATTENTION, None)) is not None:
            return reason
        if not pipe.transformer.config.causal_condition:
            return "its transformer's text and references follow the timestep (causal_condition=False)"
        if call.get("image") is None:
            return "there is no image to edit"
        if call.get("sigmas") is not None:
            return GIVEN_SIGMAS
        images = check_pictures(call["image"])
        sizes = [taken_size(image, call["output_resolution"]) for image in images]
        return too_small([output_size(pipe, call, images), *sizes], pipe.vae_scale_factor)

    # ------------------------------------------------------------------------------------------------- schedule

    def asked_steps(self, pipe: Any, asked: int | None) -> int | None:
        own = own_sigmas(pipe)
        return asked if own is None else len(own)

    def schedule_refusal(self, pipe: Any) -> str | None:
        own = own_sigmas(pipe)
        return super().schedule_refusal(pipe) or (None if own is None else why_unusable(own))

    def sigmas(self, pipe: Any, tokens: int, start: float, end: float, steps: int) -> Tensor:
        own = own_sigmas(pipe)
        if own is None:
            return super().sigmas(pipe, tokens, start, end, steps)
        return resampled(pipe.scheduler, own, tokens, start, end, steps)

    # ------------------------------------------------------------------------------------------------- prepare

    def prepare(self, pipe: Any, call: dict[str, Any], config: SpecEditConfig) -> EditState:
        images, side = check_pictures(call["image"]), pipe.vae_scale_factor
        height, width = output_size(pipe, call, images)
        pipe.check_inputs(
            call["prompt"], call["height"] or height, call["width"] or width, call["prompt_embeds"],
            call["callback_on_step_end_tensor_inputs"],
        )  # fmt: skip
        self.start_call(pipe, call, _attention_kwargs=call["attention_kwargs"] or {})
        warn_if_guidance_inactive(pipe, call)
        sizes = [taken_size(image, call["output_resolution"]) for image in images]
        taken = [pipe.image_processor.resize(one, *size) for one, size in zip(images, sizes, strict=True)]
        device = execution_device(pipe)
        positive, negative = encode(pipe, call, taken, device)
        batch, dtype = len(positive.embeds), positive.embeds.dtype
        with single_frame(pipe.vae):
            noise, reference = pipe.prepare_latents(
                [self._model_input(pipe, *one) for one in zip(images, sizes, strict=True)], batch,
                pipe.transformer.config.in_channels, height, width, dtype, device, call["generator"], call["latents"],
            )  # fmt: skip
        grid = TokenGrid(height // side, width // side, self.geometry)
        grids = tuple(TokenGrid(h // side, w // side, self.geometry) for h, w in sizes)
        beside = grids[0] if len(grids) == 1 else GridSet(grids)
        placements = place_references(self, pipe, grid, beside)
        source = placements[-1].place_pixels(source_pictures(pipe, [images[-1]], *sizes[-1]), side)
        conditioning = Qwen21Conditioning(
            positive=positive, negative=negative, scale=call["true_cfg_scale"], dtype=dtype,
            source=source.expand(batch, -1, -1, -1), kwargs=call["attention_kwargs"] or {},
        )  # fmt: skip
        return self.edit_state(
            pipe, call, config, conditioning, (noise, reference), (grid, beside), placements=placements,
            edited=len(grids) - 1, text_tokens=positive.words, fixed_prefix=True, keeps_prefix=call["use_kv_cache"],
            negative_text_tokens=None if negative is None else negative.words,
        )  # fmt: skip

    @staticmethod
    def _model_input(pipe: Any, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """A picture (1, 4, 1, H, W) for the autoencoder."""
        pixels: Tensor = pipe.image_processor.preprocess(image, height=size[0], width=size[1])
        return pixels.unsqueeze(2)

    def reference_offset(self, pipe: Any, output: TokenGrid, reference: TokenGrid) -> tuple[int, int]:
        return reference_offset(output, reference)

    def call_size(self, pipe: Any, picture: Any) -> dict[str, Any]:
        height, width = taken_size(shapes_of(picture)[-1], RESOLUTION)
        return dict(height=height, width=width, output_resolution=RESOLUTION)

    # ------------------------------------------------------------------------------------------------ velocity

    def predict(
        self, run: Run, group: LayoutGroup, sigma: float, partial: list[PartialForward] | None = None
    ) -> list[Tensor]:
        prompts = run.state.conditioning.prompts(active_branches(run.state, run.config, sigma))
        calls = zip(prompts, partial or [None] * len(prompts), strict=True)
        return [predicted(run, group, sigma, branch, *each) for branch, each in enumerate(calls)]

    # --------------------------------------------------------------------------------------- features and images

    def features(self, pipe: Any, tokens: Tensor, grid: TokenGrid) -> list[Tensor]:
        # Called by itself, the first up block adds frames before the only one, which stays the last.
        with single_frame(pipe.vae):
            return [part[:, :, -1] for part in decoder_features(pipe.vae, self.latents_of(pipe, tokens, grid))]

    @staticmethod
    def unpacked(pipe: Any, tokens: Tensor, grid: TokenGrid) -> Tensor:
        return grid.geometry.to_image(tokens, grid.shape).unsqueeze(2)

    @staticmethod
    def output(images: Any) -> QwenImagePipelineOutput:
        return QwenImagePipelineOutput(images=images)

    @staticmethod
    def drop_context(kwargs: dict[str, Any]) -> dict[str, Any]:
        """A block takes the context with its cache, and stock calls have another cache."""
        return kwargs

    @staticmethod
    def pixels_per_token(pipe: Any) -> int:
        return int(pipe.vae_scale_factor)
