"""FLUX.1-Kontext: how one call of its pipeline becomes an EditState, and what the sampler asks of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxSingleTransformerBlock
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from torch import Tensor

from ..config import SpecEditConfig
from ..layout import MixedLayout, TokenGrid
from ..method.adapter import EditState, Run, place_references
from ..released import Released
from .attention import compiled
from .attention.last_block import FluxLastBlock
from .attention.processors import FluxMixedProcessor, processors_of, why_unsupported_processor
from .registry import register_adapter
from .shared.block_adapter import GIVEN_SIGMAS, pixels_per_token
from .shared.conditioning import PromptConditioning
from .shared.devices import execution_device
from .shared.flux_blocks import MODULATED, FluxBlocks, FluxForward, FluxPrompt, attention_kwargs, image_ids
from .shared.images import check_kind, is_latents, pictures_of, source_pictures, too_small
from .shared.modulation import ModulationLayers
from .shared.placed_ids import PlacedIds, TablesHook
from .shared.prompts import broadcast_negative_prompt, count_prompts
from .shared.shapes import Shape, is_embedded_kontext, shapes_of, whole

CHECKED = (  # by the pipeline's own `check_inputs`
    "prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "prompt_embeds", "negative_prompt_embeds",
    "pooled_prompt_embeds", "negative_pooled_prompt_embeds", "callback_on_step_end_tensor_inputs",
    "max_sequence_length",
)  # fmt: skip
IP_ADAPTER = (
    "ip_adapter_image", "ip_adapter_image_embeds", "negative_ip_adapter_image", "negative_ip_adapter_image_embeds",
)  # fmt: skip


@dataclass(eq=False)
class KontextPrompt(FluxPrompt):
    """pooled: (B, D), CLIP's embedding of the whole prompt."""

    pooled: Tensor


@dataclass(kw_only=True)
class FluxConditioning(PromptConditioning[KontextPrompt]):
    """guidance: (B,) float32 of a guidance-distilled transformer, or None. kwargs: the call's for attention."""

    guidance: Tensor | None
    kwargs: dict[str, Any]


@register_adapter
class FluxKontext(FluxBlocks):
    """Adapter of FluxKontextPipeline."""

    name = "flux-kontext"
    pipelines = "FluxKontextPipeline"
    released = (Released("flux-kontext", "FLUX.1-Kontext", ("flux.1-kontext",), guided_by_prompt=True),)
    attention = FluxAttention
    processor = FluxMixedProcessor
    block = FluxSingleTransformerBlock
    trimmed = FluxLastBlock
    decodes_boxes = True
    pos_embed_hook = TablesHook
    modulation_layers = ModulationLayers("time_text_embed", blocks=MODULATED, per_sample=True)  # by the pooled prompt

    @staticmethod
    def matches(pipe: Any) -> bool:
        return isinstance(pipe, FluxKontextPipeline)

    def refusal(self, pipe: Any, call: dict[str, Any], attention: str) -> str | None:
        given = [name for name in IP_ADAPTER if call.get(name) is not None]
        if given:
            return f"{given[0]} needs the stock attention processors"
        if (reason := why_unsupported_processor(pipe.transformer, FluxAttention, attention)) is not None:
            return reason
        if any(isinstance(one, torch.nn.Module) for one in processors_of(pipe.transformer, FluxAttention)):
            return "an IP-Adapter is loaded, and it needs the stock attention processors"
        if call.get("image") is None:
            return "there is no image to edit"
        if call.get("sigmas") is not None:
            return GIVEN_SIGMAS
        multiple = pixels_per_token(pipe)
        sizes = [self._output_size(pipe, call, multiple), reference_size(pipe, call, multiple)]
        return too_small(sizes, multiple)

    # ------------------------------------------------------------------------------------------------- prepare

    def prepare(self, pipe: Any, call: dict[str, Any], config: SpecEditConfig) -> EditState:
        multiple = pixels_per_token(pipe)
        height, width = self._output_size(pipe, call, multiple)
        pipe.check_inputs(**self.size_checks(call, height, width), **{name: call[name] for name in CHECKED})
        self.start_call(pipe, call, _joint_attention_kwargs=call["joint_attention_kwargs"])
        device = execution_device(pipe)
        positive, negative = encode(pipe, call, device)
        batch, dtype = len(positive.embeds), positive.embeds.dtype
        image, latent_input = reference_image(pipe, call, multiple)
        image = image.to(device)
        if batch % len(image):
            raise ValueError(f"image: expected one picture or as many as fit {batch} edits, got {len(image)}")
        if negative is not None:
            check_negative(positive, negative)
        latents = self.noise_and_reference(pipe, call, image, batch, (height, width), dtype)
        side = 2 if latent_input else multiple  # ids would do, but bf16 rounds those beyond 256
        grid = TokenGrid(height // multiple, width // multiple)
        reference_grid = TokenGrid(*(n // side for n in image.shape[-2:]))
        placements = place_references(self, pipe, grid, reference_grid)
        source = guidance = None
        if not latent_input:  # images are tiled over the prompts, as prepare_latents does
            source = source_pictures(pipe, pictures_of(call["image"]), *image.shape[-2:])
            source = placements[0].place_pixels(source, multiple).repeat(batch // len(source), 1, 1, 1)
        if pipe.transformer.config.guidance_embeds:
            guidance = torch.full([1], call["guidance_scale"], device=device, dtype=torch.float32).expand(batch)
        conditioning = FluxConditioning(
            positive=positive, negative=negative, scale=call["true_cfg_scale"], dtype=dtype, source=source,
            guidance=guidance, kwargs=call["joint_attention_kwargs"] or {},
        )  # fmt: skip
        return self.edit_state(
            pipe, call, config, conditioning, latents, (grid, reference_grid), placements=placements,
            text_tokens=positive.embeds.shape[1], pictures=len(image),
        )  # fmt: skip

    @staticmethod
    def size_checks(call: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        """What the pipeline's `check_inputs` takes besides `CHECKED`."""
        return dict(height=height, width=width)

    @staticmethod
    def noise_and_reference(
        pipe: Any, call: dict[str, Any], image: Tensor, batch: int, size: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The call's noise and the picture's latents, both packed (batch, n, C), by the pipeline's own method."""
        channels, device = pipe.transformer.config.in_channels // 4, image.device
        latents: tuple[Tensor, Tensor] = pipe.prepare_latents(
            image, batch, channels, *size, dtype, device, call["generator"], call["latents"]
        )[:2]
        return latents

    @staticmethod
    def _output_size(pipe: Any, call: dict[str, Any], multiple: int) -> tuple[int, int]:
        """The stock pipeline's rule: the asked aspect ratio at `max_area`, down to whole tokens."""
        asked = pipe.default_sample_size * pipe.vae_scale_factor
        height, width = call["height"] or asked, call["width"] or asked
        for name, value in (("height", height), ("width", width), ("max_area", call["max_area"])):
            if not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        ratio, area = width / height, call["max_area"]
        width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if min(height, width) < multiple:
            raise ValueError(f"height, width: expected at least {multiple} px a side, got {height} x {width}")
        return height // multiple * multiple, width // multiple * multiple

    def call_size(self, pipe: Any, picture: Any) -> dict[str, Any]:
        multiple = pipe.vae_scale_factor * 2
        shape = shapes_of(picture)[0]
        if is_latents(pipe, picture):
            shape = Shape(shape.width * pipe.vae_scale_factor, shape.height * pipe.vae_scale_factor)
        height, width = whole(shape, multiple)
        embedded = is_embedded_kontext(pipe)
        if not embedded and not is_latents(pipe, picture):
            height, width = preferred_size(height, width, multiple)
        # The call takes the shape from height and width alone, and the size from the area.
        size = dict(height=height, width=width, max_area=height * width)
        return size | {"_auto_resize": False} if embedded else size

    # ------------------------------------------------------------------------------------------------ velocity

    @staticmethod
    def position_ids(
        state: EditState, layout: MixedLayout, reference_layout: MixedLayout, scale: float = 1.0
    ) -> Tensor:
        each = [image_ids(part.positions * scale, i) for i, part in enumerate((layout, reference_layout))]
        return torch.cat(each).to(state.device)

    def forward(self, run: Run, prompt: KontextPrompt, inputs: FluxForward) -> Tensor:
        conditioning: FluxConditioning = run.state.conditioning
        kwargs = conditioning.kwargs | attention_kwargs(inputs.context, conditioning.dtype)
        return run.pipe.transformer(
            hidden_states=inputs.states,
            timestep=inputs.timestep,
            guidance=None if conditioning.guidance is None else conditioning.guidance[inputs.rows],
            pooled_projections=prompt.pooled[inputs.rows],
            encoder_hidden_states=inputs.text,
            txt_ids=inputs.text_ids,
            img_ids=placed(run.pipe.transformer, inputs),
            # A copy, since the transformer pops the LoRA scale; None as in stock calls, which {} would recompile.
            joint_attention_kwargs=kwargs or None,
            return_dict=False,
        )[0]

    @staticmethod
    def output(images: Any) -> FluxPipelineOutput:
        return FluxPipelineOutput(images=images)


def placed(transformer: Any, inputs: FluxForward) -> Tensor:
    """The ids of a forward pass, with their tables where they are known and nothing is to be traced."""
    if inputs.tables is None or compiled.is_whole(transformer):
        return inputs.ids
    return PlacedIds.of(inputs.ids, inputs.tables)


def preferred_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """Height and width of the resolution that FLUX.1-Kontext prefers for a picture, by the stock pipeline's rule."""
    ratio = width / height
    _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    return height // multiple * multiple, width // multiple * multiple


def encode(pipe: Any, call: dict[str, Any], device: torch.device) -> tuple[KontextPrompt, KontextPrompt | None]:
    """The prompt, and under true classifier-free guidance the negative one."""
    total = count_prompts(call) * call["num_images_per_prompt"]

    def one_each(part: Tensor) -> Tensor:
        return part if total % len(part) else part.repeat_interleave(total // len(part), 0)

    def one(prefix: str) -> KontextPrompt:
        embeds, pooled, ids = pipe.encode_prompt(
            prompt=call[f"{prefix}prompt"], prompt_2=call[f"{prefix}prompt_2"],
            prompt_embeds=call[f"{prefix}prompt_embeds"], pooled_prompt_embeds=call[f"{prefix}pooled_prompt_embeds"],
            device=device, num_images_per_prompt=call["num_images_per_prompt"],
            lora_scale=(call["joint_attention_kwargs"] or {}).get("scale"),
            max_sequence_length=call["max_sequence_length"],
        )  # fmt: skip
        # Given embeddings come back as they are, and broadcast over the pictures that are made from them.
        embeds, pooled = (one_each(part.to(device)) for part in (embeds, pooled))
        return KontextPrompt(embeds, ids, pooled)

    given = call["negative_prompt_embeds"] is not None and call["negative_pooled_prompt_embeds"] is not None
    if not (call["true_cfg_scale"] > 1 and (call["negative_prompt"] is not None or given)):
        return one(""), None
    call = broadcast_negative_prompt(call)
    return one(""), one("negative_")


def reference_image(pipe: Any, call: dict[str, Any], multiple: int) -> tuple[Tensor, bool]:
    """The conditioning image as the stock pipeline prepares it, and whether latents were given."""
    image = call["image"]
    if is_latents(pipe, image):
        return image, True
    pictures_of(image, values=True)
    size = reference_size(pipe, call, multiple)
    # Preprocessed in the form it was given: another memory layout would round differently than the stock pipeline.
    image = pipe.image_processor.resize(image[None] if getattr(image, "ndim", 4) == 3 else image, *size)
    return pipe.image_processor.preprocess(image, *size), False


def reference_size(pipe: Any, call: dict[str, Any], multiple: int) -> tuple[int, int]:
    """Height and width at which the model takes the first picture, by the stock pipeline's rule."""
    image = call["image"]
    if is_latents(pipe, image):
        return tuple(side * pipe.vae_scale_factor for side in image.shape[-2:])
    given = check_kind(pictures_of(image)[0])
    height, width = (side // multiple * multiple for side in given)
    if min(height, width) < 1:
        raise ValueError(f"image: expected at least {multiple} px a side, got {given[1]} x {given[0]}")
    if call["_auto_resize"]:
        height, width = preferred_size(height, width, multiple)
    return height // multiple * multiple, width // multiple * multiple


def check_negative(positive: KontextPrompt, negative: KontextPrompt) -> None:
    """ValueError unless both prompts of true classifier-free guidance have one shape."""
    for argument, name in (("encoder_hidden_states", "embeds"), ("pooled_projections", "pooled")):
        expected, got = tuple(getattr(positive, name).shape), tuple(getattr(negative, name).shape)
        if expected != got:
            raise ValueError(f"negative prompt: expected {argument} of shape {expected}, as the prompt's, got {got}")
