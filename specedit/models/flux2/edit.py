"""What FLUX.2's pipelines share: how a call becomes an EditState, and how tokens become latents."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock
from diffusers.pipelines.flux2.pipeline_output import Flux2PipelineOutput
from torch import Tensor

from ...config import SpecEditConfig
from ...layout import GridSet, LayoutSet, MixedLayout, TokenGrid
from ...method.adapter import EditState, Run, place_references
from ..attention.processors import why_unsupported_processor
from ..shared.block_adapter import GIVEN_SIGMAS, pixels_per_token
from ..shared.conditioning import PromptConditioning
from ..shared.devices import execution_device
from ..shared.flux_blocks import FluxBlocks, FluxForward, FluxPrompt, attention_kwargs
from ..shared.images import decoder_dtype, given_list, too_small
from ..shared.modulation import ModulationLayers
from ..shared.prompts import count_prompts
from ..shared.shapes import shapes_of
from . import pictures
from .attention import ATTENTION, Flux2LastBlock, wrap
from .schedule import flux2_sigmas

REFERENCE_STEP = 10  # reference i lies at T = 10 + 10 i; the output at T = 0


@dataclass(kw_only=True)
class Flux2Conditioning(PromptConditioning[FluxPrompt]):
    """guidance: (B,) float32 of a guidance-distilled transformer, or None. kwargs: the call's for attention."""

    guidance: Tensor | None
    kwargs: dict[str, Any]


class Flux2Blocks(FluxBlocks):
    """An adapter of one of these pipelines. The first of several references is the picture being edited.

    Tokens are normalised per packed channel, as the transformer takes them. Everything is averaged and expanded in this
    space, where the noise is white; `_latents` alone undoes it, for the decoder.
    """

    attention = ATTENTION
    processor = staticmethod(wrap)
    block = Flux2SingleTransformerBlock
    trimmed = Flux2LastBlock
    modulation_layers = ModulationLayers(  # shared by all blocks of a kind
        "time_guidance_embed",
        (
            "double_stream_modulation_img.linear", "double_stream_modulation_txt.linear",
            "single_stream_modulation.linear", "norm_out.linear",
        ),
    )  # fmt: skip
    runs_others: ClassVar[bool] = True  # whether attention="stock" runs whatever processors there are

    def refusal(self, pipe: Any, call: dict[str, Any], attention: str) -> str | None:
        backend = attention if self.runs_others else None
        if (reason := why_unsupported_processor(pipe.transformer, ATTENTION, backend)) is not None:
            return reason
        if call.get("image") is None:
            return "there is no image to edit"
        if call.get("sigmas") is not None:
            return GIVEN_SIGMAS
        images = pictures.check_references(pipe, call["image"])
        sizes = [pictures.taken_size(pipe, image) for image in images]
        return too_small([self.output_size(pipe, call, sizes[0]), *sizes], pixels_per_token(pipe))

    def sigmas(self, pipe: Any, tokens: int, start: float, end: float, steps: int) -> Tensor:
        return flux2_sigmas(pipe.scheduler, tokens, start, end, steps)

    # ------------------------------------------------------------------------------------------------- prepare

    def prepare(self, pipe: Any, call: dict[str, Any], config: SpecEditConfig) -> EditState:
        known = inspect.signature(pipe.check_inputs).parameters
        pipe.check_inputs(**{name: call[name] for name in known if name in call})
        edited, others = self.taken_pictures(pipe, call)
        height, width = self.output_size(pipe, call, edited[0].size[::-1])
        multiple, channels = pixels_per_token(pipe), pipe.transformer.config.in_channels
        grid = TokenGrid(height // multiple, width // multiple)
        if (given := call["latents"]) is not None:
            expected = (count_prompts(call) * call["num_images_per_prompt"], channels, *grid.shape)
            if tuple(given.shape) != expected:
                raise ValueError(f"latents: expected shape {expected}, got {tuple(given.shape)}")
        self.start_call(pipe, call, _attention_kwargs=call["attention_kwargs"])
        device = execution_device(pipe)
        positive, negative = self.prompts(pipe, call, device)
        batch, dtype = len(positive.embeds), positive.embeds.dtype
        if batch % len(edited):
            raise ValueError(f"image: expected one picture or as many as fit {batch} edits, got {len(edited)}")
        latents = self.noise_and_references(pipe, call, (edited, others), (batch, height, width), positive.embeds)
        references = [edited[0], *others]
        grids = tuple(TokenGrid(picture.height // multiple, picture.width // multiple) for picture in references)
        beside = grids[0] if len(grids) == 1 else GridSet(grids)
        placements = place_references(self, pipe, grid, beside)
        source = torch.cat([pictures.source_of(pipe, picture) for picture in edited])
        source = placements[0].place_pixels(source, multiple)
        conditioning = Flux2Conditioning(
            positive=positive, negative=negative, scale=call.get("guidance_scale", 1.0), dtype=dtype,
            source=source.repeat(batch // len(source), 1, 1, 1), guidance=self.guidance(call, batch, device),
            kwargs=call["attention_kwargs"] or {},
        )  # fmt: skip
        return self.edit_state(
            pipe, call, config, conditioning, latents, (grid, beside), placements=placements,
            text_tokens=positive.embeds.shape[1],
        )  # fmt: skip

    def taken_pictures(self, pipe: Any, call: dict[str, Any]) -> pictures.Taken:
        """The pictures being edited, of one size, over which the batch repeats, and the other references."""
        first, *others = (pictures.taken_picture(pipe, image) for image in given_list(call["image"]))
        return [first], others

    def output_size(self, pipe: Any, call: dict[str, Any], taken: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output. taken: those of the picture being edited."""
        return pictures.output_size(pipe, call, taken)

    def noise_and_references(
        self, pipe: Any, call: dict[str, Any], taken: pictures.Taken, shape: tuple[int, int, int], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The call's noise and the references' latents, packed (B, n, C), with the dtype and on the device of `like`.

        shape: B, height and width of the output.
        """
        (batch, height, width), device, dtype, edited = shape, like.device, like.dtype, taken[0]
        noise, _ = pipe.prepare_latents(
            batch_size=batch, num_latents_channels=pipe.transformer.config.in_channels // 4, height=height, width=width,
            dtype=dtype, device=device, generator=call["generator"], latents=call["latents"],
        )  # fmt: skip
        reference, _ = pipe.prepare_image_latents(
            images=[pictures.model_input(pipe, picture) for picture in (*edited, *taken[1])], batch_size=batch,
            generator=call["generator"], device=device, dtype=pipe.vae.dtype,
        )  # fmt: skip
        return noise, reference

    def prompts(self, pipe: Any, call: dict[str, Any], device: torch.device) -> tuple[FluxPrompt, FluxPrompt | None]:
        """The prompt, and under true classifier-free guidance the negative one."""
        return encoded(pipe, call, device, call["prompt"], call["prompt_embeds"]), None

    @staticmethod
    def guidance(call: dict[str, Any], batch: int, device: torch.device) -> Tensor | None:
        """(B,) float32: the scale that the transformer takes, or None."""
        return None

    def call_size(self, pipe: Any, picture: Any) -> dict[str, Any]:
        height, width = pictures.taken_size(pipe, shapes_of(picture)[0])
        return dict(height=height, width=width)

    # ------------------------------------------------------------------------------------------------ velocity

    @staticmethod
    def position_ids(
        state: EditState, layout: MixedLayout, reference_layout: MixedLayout | LayoutSet, scale: float = 1.0
    ) -> Tensor:
        times = [0, *(REFERENCE_STEP * (i + 1) for i in range(len(reference_layout.layouts)))]
        parts = zip(times, (layout, *reference_layout.layouts), strict=True)
        return torch.cat([ids_at(part.positions * scale, time) for time, part in parts]).to(state.device)

    def forward(self, run: Run, prompt: FluxPrompt, inputs: FluxForward) -> Tensor:
        return run.pipe.transformer(**transformer_inputs(run, inputs), return_dict=False)[0]

    # --------------------------------------------------------------------------------------- features and images

    def encode(self, pipe: Any, pictures: Tensor, grid: TokenGrid) -> Tensor:
        return self.encoded(pipe, pictures).flatten(2).transpose(1, 2)

    @staticmethod
    def _latents(pipe: Any, tokens: Tensor, grid: TokenGrid) -> Tensor:
        return denormalised(pipe, tokens, grid).to(decoder_dtype(pipe.vae))

    @staticmethod
    def output(images: Any) -> Flux2PipelineOutput:
        return Flux2PipelineOutput(images=images)


class Flux2Unpacked(Flux2Blocks):
    """Of pipelines that return latents as the autoencoder takes them, not as the transformer does."""

    def decode(self, pipe: Any, state: EditState, tokens: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return denormalised(pipe, tokens.to(state.conditioning.dtype), state.grid)
        return super().decode(pipe, state, tokens, output_type)


def transformer_inputs(run: Run, inputs: FluxForward) -> dict[str, Any]:
    """Arguments of the transformer for one forward pass."""
    conditioning: Flux2Conditioning = run.state.conditioning
    kwargs = conditioning.kwargs | attention_kwargs(inputs.context, conditioning.dtype)
    return dict(
        hidden_states=inputs.states, timestep=inputs.timestep, encoder_hidden_states=inputs.text,
        guidance=None if conditioning.guidance is None else conditioning.guidance[inputs.rows],
        txt_ids=inputs.text_ids, img_ids=inputs.ids,
        joint_attention_kwargs=kwargs or None,  # as in stock calls, which {} would recompile
    )  # fmt: skip


def encoded(pipe: Any, call: dict[str, Any], device: torch.device, prompt: Any, given: Tensor | None) -> FluxPrompt:
    """A prompt, or given embeddings, for every image that the call makes."""
    embeds, ids = pipe.encode_prompt(
        prompt=prompt, prompt_embeds=given, device=device, num_images_per_prompt=call["num_images_per_prompt"],
        max_sequence_length=call["max_sequence_length"], text_encoder_out_layers=call["text_encoder_out_layers"],
    )  # fmt: skip
    return FluxPrompt(embeds.to(device), ids[0])


def ids_at(positions: Tensor, time: int) -> Tensor:
    """Position ids (N, 4) float32 of an image's tokens: time, row, column, and 0 for the place within a text."""
    ids = torch.zeros(len(positions), 4, dtype=positions.dtype, device=positions.device)
    ids[:, 0] = time
    ids[:, 1:3] = positions
    return ids


def denormalised(pipe: Any, tokens: Tensor, grid: TokenGrid) -> Tensor:
    """Latents (B, c, 2 h, 2 w) of tokens (B, h * w, 4 c), with the statistics that the batch norm took away."""
    packed = tokens.unflatten(1, grid.shape).movedim(-1, 1)
    mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1).to(packed)
    std = torch.sqrt(pipe.vae.bn.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps).to(packed)
    return pipe._unpatchify_latents(packed * std + mean)
