"""FLUX.1-Kontext: how one call of its pipeline becomes an EditState, and what the sampler asks of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import FluxKontextPipeline
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxSingleTransformerBlock
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from torch import Tensor

from ..config import SpecEditConfig
from ..forecast.toca import PartialForward
from ..layout import MixedLayout, TokenGrid
from ..method.adapter import Adapter, EditState, LayoutGroup, Run, active_branches, place_references, rows_index
from .attention import compiled, last_block
from .attention import contexts as joint
from .attention import processors as attention
from .shared.images import batched, check_image, check_kind, decoder_features, is_latents, source_pictures, too_small
from .shared.prompts import broadcast_negative_prompt, count_prompts
from .shared.shapes import Shape, is_embedded_kontext, shapes_of, whole

IP_ADAPTER = (
    "ip_adapter_image", "ip_adapter_image_embeds", "negative_ip_adapter_image", "negative_ip_adapter_image_embeds",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sequence:
    """What the transformer is told alike in every step of a stage.

    ids (N, 3) float32: positions of target and reference. rows: which prompts. kwargs: of attention.
    """

    layout: MixedLayout
    reference_layout: MixedLayout
    ids: Tensor
    rows: slice | Tensor
    kwargs: dict[str, Any]


class FluxKontext(Adapter):
    """Adapter of FluxKontextPipeline."""

    name = "flux-kontext"
    pipelines = "FluxKontextPipeline"
    token_wise = True
    keeps_reference = True

    @staticmethod
    def matches(pipe: Any) -> bool:
        return isinstance(pipe, FluxKontextPipeline)

    def refusal(self, pipe: Any, call: dict[str, Any], backend: str) -> str | None:
        given = [name for name in IP_ADAPTER if call.get(name) is not None]
        if given:
            return f"{given[0]} needs the stock attention processors"
        if (reason := attention.why_unsupported_processor(pipe.transformer, FluxAttention, backend)) is not None:
            return reason
        if any(isinstance(processor, torch.nn.Module) for processor in pipe.transformer.attn_processors.values()):
            return "an IP-Adapter is loaded, and it needs the stock attention processors"
        if call.get("image") is None:
            return "there is no image to edit"
        if call.get("sigmas") is not None:
            return "sigmas were given, and SpecEdit's stages choose their own"
        multiple = pipe.vae_scale_factor * 2
        sizes = [self._output_size(pipe, call, multiple), self._reference_size(pipe, call, multiple)]
        return too_small(sizes, multiple)

    # ------------------------------------------------------------------------------------------------- prepare

    def prepare(self, pipe: Any, call: dict[str, Any], config: SpecEditConfig) -> EditState:
        multiple = pipe.vae_scale_factor * 2
        height, width = self._output_size(pipe, call, multiple)
        pipe.check_inputs(
            call["prompt"], call["prompt_2"], height, width,
            negative_prompt=call["negative_prompt"], negative_prompt_2=call["negative_prompt_2"],
            prompt_embeds=call["prompt_embeds"], negative_prompt_embeds=call["negative_prompt_embeds"],
            pooled_prompt_embeds=call["pooled_prompt_embeds"],
            negative_pooled_prompt_embeds=call["negative_pooled_prompt_embeds"],
            callback_on_step_end_tensor_inputs=call["callback_on_step_end_tensor_inputs"],
            max_sequence_length=call["max_sequence_length"],
        )  # fmt: skip
        pipe._guidance_scale = call["guidance_scale"]
        pipe._joint_attention_kwargs = call["joint_attention_kwargs"]
        pipe._current_timestep = None
        pipe._interrupt = False
        device = pipe._execution_device
        positive, negative = self._encode(pipe, call, device)
        prompts = positive["encoder_hidden_states"].shape[0]
        dtype = positive["encoder_hidden_states"].dtype

        image, latent_input = self._image(pipe, call, multiple)
        if prompts % len(image):
            raise ValueError(f"image: expected one picture or as many as fit {prompts} edits, got {len(image)}")
        channels = pipe.transformer.config.in_channels // 4
        if negative is not None:
            check_negative(positive, negative)
        noise, reference, _, _ = pipe.prepare_latents(
            image, prompts, channels, height, width, dtype, device, call["generator"], call["latents"]
        )
        side = 2 if latent_input else multiple  # ids would do, but bf16 rounds those beyond 256
        reference_grid = TokenGrid(*(n // side for n in image.shape[-2:]))
        grid = TokenGrid(height // multiple, width // multiple)
        if tuple(noise.shape) != (expected := (prompts, grid.tokens, pipe.transformer.config.in_channels)):
            raise ValueError(f"latents: expected shape {expected}, got {tuple(noise.shape)}")
        state = EditState(
            grid=grid,
            noise=noise.float(),
            reference=reference.float(),
            reference_grid=reference_grid,
            placements=place_references(self, pipe, grid, reference_grid),
            generator=call["generator"],
            text_tokens=positive["encoder_hidden_states"].shape[1],
            branches=1 if negative is None else 2,
            pixels_per_token=multiple,
            backend={"auto": None, "stock": "torch"}.get(config.attention, config.attention),
            prompts=count_prompts(call),
            pictures=len(image),
            last_block=self._trims(pipe, config.attention),
            extra=dict(
                positive=positive, negative=negative, dtype=dtype, height=height, width=width,
                true_cfg_scale=call["true_cfg_scale"], kwargs=call["joint_attention_kwargs"] or {},
            ),
        )  # fmt: skip
        if not latent_input:  # images are tiled over the prompts, as prepare_latents does
            source = source_pictures(pipe, call["image"], *image.shape[-2:])
            source = state.placement.place_pixels(source, multiple)
            state.extra["source"] = source.repeat(prompts // len(source), 1, 1, 1)
        if pipe.transformer.config.guidance_embeds:
            guidance = torch.full([1], call["guidance_scale"], device=device, dtype=torch.float32)
            state.extra["guidance"] = guidance.expand(prompts)
        return state

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

    @staticmethod
    def _encode(pipe: Any, call: dict[str, Any], device: torch.device) -> tuple[dict, dict | None]:
        kwargs = call["joint_attention_kwargs"] or {}
        shared = dict(
            device=device, num_images_per_prompt=call["num_images_per_prompt"], lora_scale=kwargs.get("scale"),
            max_sequence_length=call["max_sequence_length"],
        )  # fmt: skip

        total = count_prompts(call) * call["num_images_per_prompt"]

        def one_each(part: Tensor) -> Tensor:
            return part if total % len(part) else part.repeat_interleave(total // len(part), 0)

        def encode(prefix: str) -> dict[str, Tensor]:
            embeds, pooled, ids = pipe.encode_prompt(
                prompt=call[f"{prefix}prompt"], prompt_2=call[f"{prefix}prompt_2"],
                prompt_embeds=call[f"{prefix}prompt_embeds"],
                pooled_prompt_embeds=call[f"{prefix}pooled_prompt_embeds"],
                **shared,
            )  # fmt: skip
            # Given embeddings come back as they are, and broadcast over the pictures that are made from them.
            embeds, pooled = (one_each(part.to(device)) for part in (embeds, pooled))
            return dict(encoder_hidden_states=embeds, pooled_projections=pooled, txt_ids=ids)

        given = call["negative_prompt_embeds"] is not None and call["negative_pooled_prompt_embeds"] is not None
        guided = call["true_cfg_scale"] > 1 and (call["negative_prompt"] is not None or given)
        call = broadcast_negative_prompt(call) if guided else call
        return encode(""), encode("negative_") if guided else None

    @staticmethod
    def _image(pipe: Any, call: dict[str, Any], multiple: int) -> tuple[Tensor, bool]:
        """The conditioning image at the size the model takes it, as the stock pipeline prepares it."""
        image = call["image"]
        if is_latents(pipe, image):
            return image, True
        for one in image if isinstance(image, list) else [image]:
            check_image(one)
        height, width = FluxKontext._reference_size(pipe, call, multiple)
        image = pipe.image_processor.resize(batched(image), height, width)
        return pipe.image_processor.preprocess(image, height, width), False

    @staticmethod
    def _reference_size(pipe: Any, call: dict[str, Any], multiple: int) -> tuple[int, int]:
        """Height and width at which the model takes the first picture, by the stock pipeline's rule."""
        image = call["image"]
        if is_latents(pipe, image):
            return tuple(side * pipe.vae_scale_factor for side in image.shape[-2:])
        if isinstance(image, list) and not image:
            raise ValueError("image: expected at least one picture, got an empty list")
        given = check_kind(image[0] if isinstance(image, list) else image)
        height, width = (side // multiple * multiple for side in given)
        if min(height, width) < 1:
            raise ValueError(f"image: expected at least {multiple} px a side, got {given[1]} x {given[0]}")
        if call["_auto_resize"]:
            height, width = preferred_size(height, width, multiple)
        return height // multiple * multiple, width // multiple * multiple

    def reference_offset(self, pipe: Any, output: TokenGrid, reference: TokenGrid) -> tuple[int, int]:
        return 0, 0  # rows and columns of every image count from its first token

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

    def predict(
        self, run: Run, group: LayoutGroup, sigma: float, partial: list[PartialForward] | None = None
    ) -> list[Tensor]:
        pipe, state, config, calls = run.pipe, run.state, run.config, partial
        tokens, rows, layout = group.tokens, group.rows, group.layout
        reference, reference_layout = group.reference, group.reference_layout
        dtype, device = state.extra["dtype"], tokens.device
        sequence = self._sequence(pipe, state, rows, layout, reference_layout, config, bool(calls))
        states = torch.cat([tokens, reference], 1).to(dtype)
        timestep = torch.full((len(rows),), sigma * 1000, device=device, dtype=torch.float32).to(dtype) / 1000

        def branch(prompt: dict[str, Tensor], call: Any) -> Tensor:
            words = prompt["encoder_hidden_states"][sequence.rows], prompt["txt_ids"]
            chosen, ids, kwargs = states, sequence.ids, sequence.kwargs
            if call is not None:
                chosen, ids, context = self._partial_inputs(state, states, ids, layout.tokens, kwargs["specedit"], call)
                kwargs = kwargs | {"specedit": context}
                if call.target:
                    words = words[0][:, :0], words[1][:0]
            out = self._forward(pipe, state, prompt, sequence.rows, chosen, ids, *words, timestep, kwargs)
            return out[:, : tokens.shape[1]].float()

        active = active_branches(state, config, sigma)
        prompts = [state.extra["positive"], state.extra["negative"]][:active]
        return [branch(prompt, call) for prompt, call in zip(prompts, calls or [None] * active, strict=True)]

    @staticmethod
    def _forward(
        pipe: Any, state: EditState, prompt: dict[str, Tensor], rows: slice | Tensor, states: Tensor, ids: Tensor,
        words: Tensor, text_ids: Tensor, timestep: Tensor, kwargs: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """The transformer's output for hidden states (b, n, C) and embeddings `words` (b, L, D)."""
        guidance = state.extra.get("guidance")
        kwargs = state.extra["kwargs"] | kwargs  # a new one: the transformer takes the LoRA scale out of it
        return pipe.transformer(
            hidden_states=states,
            timestep=timestep,
            guidance=None if guidance is None else guidance[rows],
            pooled_projections=prompt["pooled_projections"][rows],
            encoder_hidden_states=words,
            txt_ids=text_ids,
            img_ids=ids,
            joint_attention_kwargs=kwargs or None,  # as stock calls give none, and no graph is compiled for {}
            return_dict=False,
        )[0]

    def guide(self, run: Run, outputs: list[Tensor]) -> Tensor:
        velocity, *others = outputs
        for negative in others:
            velocity = negative + run.state.extra["true_cfg_scale"] * (velocity - negative)
        return velocity

    def _sequence(self, pipe, state: EditState, rows, layout, reference_layout, config, keeps: bool) -> Sequence:
        """Made by the first step of a stage for all of them. `keeps`: a temporal cache needs our own attention."""
        made = state.extra.setdefault("sequences", {})
        # The entry holds the layouts, so that no other object can take their ids.
        key = (id(layout), id(reference_layout), *rows, config.attention, config.key_bias, config.rope, keeps)
        if key not in made:
            context = self._context(pipe, state, layout, reference_layout, config, keeps)
            kwargs = {} if context is None else self._attention_kwargs(context, config, state.extra["dtype"])
            ids = self._ids(state, layout, reference_layout)
            made[key] = Sequence(layout, reference_layout, ids, rows_index(rows, state.device), kwargs)
        return made[key]

    @staticmethod
    def _ids(state: EditState, layout, reference_layout, scale: float = 1.0) -> Tensor:
        """Position ids of target and reference (N, 3); `scale`: of rows and columns."""
        each = [position_ids(part.positions * scale, i) for i, part in enumerate((layout, reference_layout))]
        return torch.cat(each).to(state.device)

    @staticmethod
    def _attention_kwargs(context: joint.MixedContext, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """How the transformer is told of a context: the model's own processors take a bias as a mask."""
        if config.attention == "stock":
            return {"attention_mask": context.key_bias.to(dtype)[None, None, None]}
        return {"specedit": context}

    def _context(
        self, pipe, state: EditState, layout, reference_layout, config, keeps: bool
    ) -> joint.MixedContext | None:
        """What attention is told, or None where the stock processors need no telling."""
        area = torch.cat([layout.area, reference_layout.area]).to(state.device)
        target, mixed = len(layout.area), layout.is_mixed or reference_layout.is_mixed
        text = torch.zeros(state.text_tokens, device=area.device)
        bias = torch.cat([text, area.log()]) if mixed and config.key_bias == "area" else None
        if config.attention == "stock":
            return None if bias is None else joint.MixedContext(bias, backend="stock")
        own = mixed or keeps or config.attention != "auto"
        if not own and not state.last_block:
            return None
        text_ids = state.extra["positive"]["txt_ids"]

        def rotary(ids: Tensor) -> tuple[Tensor, Tensor]:
            tables = pipe.transformer.pos_embed(torch.cat([text_ids.to(ids), ids]))
            return tuple(attention.half_table(table) for table in tables)

        segments = coarse_rotary = asked = None
        if mixed and config.rope == "phase_aligned":
            segments = joint.segments(torch.cat([text > 0, area > 1]))
            asked = joint.segments(area[:target] > 1, [target], [len(text) + len(area)])
            coarse_rotary = rotary(self._ids(state, layout, reference_layout, 0.5))
        index = torch.arange(len(text) + len(area), device=area.device)
        return joint.MixedContext(
            bias, segments, coarse_rotary, state.backend if own else "stock",
            rotary=rotary(self._ids(state, layout, reference_layout)), index=index,
            read=joint.QueryRows(index[:target], asked) if state.last_block else None, plain=not own,
        )  # fmt: skip

    @staticmethod
    def _partial_inputs(
        state: EditState, states: Tensor, ids: Tensor, target: int, context: joint.MixedContext, call: Any
    ):
        """Hidden states, ids and attention context of a call that keeps keys and values, or computes some tokens."""
        call.store.text_tokens = state.text_tokens
        if not call.partial:
            return states, ids, dataclasses.replace(context, store=call.store.entries)
        first = state.text_tokens
        if call.target:
            tables = tuple(table[first : first + target] for table in context.rotary)
            rows = torch.arange(first, first + target, device=ids.device).expand(len(states), -1)
            partial = dataclasses.replace(context, store=call.store.entries, rows=rows, rotary=tables)
            return states[:, :target], ids[:target], partial
        text = torch.arange(first, device=ids.device).expand(len(states), -1)
        rows = torch.cat([text, first + call.index], 1)  # (b, text + m) of the joint sequence
        tables = tuple(table[rows] for table in context.rotary)
        read = None if context.read is None else joint.QueryRows(call.index[0])
        partial = dataclasses.replace(context, store=call.store.entries, rows=rows, rotary=tables, read=read)
        # The processors take their positions from the context, which knows every sample's own.
        index = call.index[..., None].expand(-1, -1, states.shape[2])
        return states.gather(1, index), ids[: call.index.shape[1]], partial

    # --------------------------------------------------------------------------------------- features and images

    def features(self, pipe: Any, tokens: Tensor, grid: TokenGrid) -> list[Tensor]:
        return decoder_features(pipe.vae, self._latents(pipe, tokens, grid))

    def decode(self, pipe: Any, state: EditState, tokens: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return tokens.to(state.extra["dtype"])
        image = pipe.vae.decode(self._latents(pipe, tokens, state.grid), return_dict=False)[0]
        return pipe.image_processor.postprocess(image, output_type=output_type)

    @staticmethod
    def _latents(pipe: Any, tokens: Tensor, grid: TokenGrid) -> Tensor:
        side = pipe.vae_scale_factor * 2
        latents = pipe._unpack_latents(tokens, grid.height * side, grid.width * side, pipe.vae_scale_factor)
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        return latents.to(pipe.vae.dtype)

    @staticmethod
    def output(images: Any) -> FluxPipelineOutput:
        return FluxPipelineOutput(images=images)

    # ---------------------------------------------------------------------------------------------- processors

    def attach(self, pipe: Any) -> None:
        attention.attach(pipe.transformer, FluxAttention, attention.FluxMixedProcessor)
        last_block.attach(self._last(pipe), FluxSingleTransformerBlock, last_block.FluxLastBlock)
        drop = partial(compiled.drop_keyword, nothing=None)
        compiled.attach(pipe.transformer, compiled.take_keyword, drop, self._last(pipe))

    def detach(self, pipe: Any) -> None:
        attention.detach(pipe.transformer, FluxAttention)
        last_block.detach(self._last(pipe))
        compiled.detach(pipe.transformer)

    @staticmethod
    def _last(pipe: Any) -> torch.nn.Module | None:
        """The last single block; None of a transformer without any, whose double blocks stay as they are."""
        return last_block.last(pipe.transformer, "single_transformer_blocks")

    def _trims(self, pipe: Any, attention: str) -> bool:
        """Whether the last block will compute the target's rows alone."""
        return attention != "stock" and last_block.trims(self._last(pipe))


def preferred_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """Height and width of the resolution that FLUX.1-Kontext prefers for a picture, by the stock pipeline's rule."""
    ratio = width / height
    _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    return height // multiple * multiple, width // multiple * multiple


def check_negative(positive: dict[str, Tensor], negative: dict[str, Tensor]) -> None:
    """ValueError unless both prompts of true classifier-free guidance have one shape."""
    for name in ("encoder_hidden_states", "pooled_projections"):
        expected, got = tuple(positive[name].shape), tuple(negative[name].shape)
        if expected != got:
            raise ValueError(f"negative prompt: expected {name} of shape {expected}, as the prompt's, got {got}")


def position_ids(positions: Tensor, image: int) -> Tensor:
    """FLUX's position ids (N, 3) float32: image index, row, column. bf16 would round 200.5."""
    return torch.cat([torch.full_like(positions[:, :1], image), positions], 1)
