"""What adapters of diffusers' transformers share: their hooks, and the state of a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor, nn

from ...choices import backend_of
from ...config import SpecEditConfig
from ...layout import GridSet, TokenGrid
from ...method.adapter import Adapter, EditState, Run
from ..attention import compiled, last_block, processors
from ..attention.contexts import Context
from . import modulation, position_hook
from .conditioning import PromptConditioning
from .devices import execution_device
from .prompts import count_prompts

GIVEN_SIGMAS = "sigmas were given, and SpecEdit's stages choose their own"


class BlockAdapter(Adapter):
    """An adapter whose family names the classes that it hooks.

    attention, processor: of the transformer's attention modules, and what makes a replacement of a processor. block,
    trimmed: of the last block in the list `blocks`, and the hook that trims it. pos_embed_hook: of positions, or None.
    modulation_layers: for modulation="once", or None.
    """

    attention: ClassVar[type[nn.Module] | tuple[type[nn.Module], ...]]
    processor: ClassVar[Callable[[Any], processors.MixedProcessor]]
    block: ClassVar[type[nn.Module]]
    trimmed: ClassVar[type[last_block.LastBlock]]
    blocks: ClassVar[str]
    pos_embed_hook: ClassVar[type[position_hook.PositionHook] | None] = None
    modulation_layers: ClassVar[modulation.ModulationLayers | None] = None

    @staticmethod
    def take_context(kwargs: dict[str, Any]) -> Context | None:
        """The context among a block's arguments."""
        return compiled.take_keyword(kwargs)

    @staticmethod
    def drop_context(kwargs: dict[str, Any]) -> dict[str, Any]:
        """A block's arguments without the context, as a stock call has them."""
        return compiled.drop_keyword(kwargs, nothing=None)

    def attach(self, pipe: Any) -> None:
        transformer, last = pipe.transformer, self.last_block(pipe)
        processors.attach(transformer, self.attention, self.processor)
        if self.pos_embed_hook is not None and hasattr(transformer, "pos_embed"):  # another engine may have none
            position_hook.attach(transformer.pos_embed, self.pos_embed_hook)
        last_block.attach(last, self.block, self.trimmed)
        compiled.attach(transformer, self.take_context, self.drop_context, last)

    def detach(self, pipe: Any) -> None:
        transformer = pipe.transformer
        processors.detach(transformer, self.attention)
        if self.pos_embed_hook is not None and hasattr(transformer, "pos_embed"):
            position_hook.detach(transformer.pos_embed)
        last_block.detach(self.last_block(pipe))
        compiled.detach(transformer)

    def why_modulated_every_step(self, pipe: Any) -> str | None:
        if self.modulation_layers is None:
            return super().why_modulated_every_step(pipe)
        return modulation.why_every_step(pipe.transformer, self.modulation_layers)

    def modulated_once(self, run: Run, sigmas: Sequence[float]) -> AbstractContextManager[None]:
        if self.modulation_layers is None:
            return super().modulated_once(run, sigmas)
        return modulation.once(run, self.modulation_layers, sigmas)

    def last_block(self, pipe: Any) -> nn.Module | None:
        """The block that is trimmed; None of a transformer without any, such as another engine's, or of a family that
        reads all rows."""
        return last_block.last(pipe.transformer, self.blocks)

    def trims_last_block(self, pipe: Any, config: SpecEditConfig) -> bool:
        """Whether the last block will compute the target's rows alone."""
        return config.attention != "stock" and last_block.trims(self.last_block(pipe))

    @staticmethod
    def pixels_per_token(pipe: Any) -> int:
        """Pixels a side of a token."""
        return pixels_per_token(pipe)

    def guide(self, run: Run, outputs: list[Tensor]) -> Tensor:
        """Classifier-free guidance, where there is a negative prompt."""
        velocity, *others = outputs
        for negative in others:
            velocity = negative + run.state.conditioning.scale * (velocity - negative)
        return velocity

    @staticmethod
    def encoded(pipe: Any, pictures: Tensor) -> Tensor:
        """Latents of pictures (B, 3, H, W) in 0..1, or with a frame axis, by the pipeline's own method."""
        device = execution_device(pipe, pictures.device)
        latents: Tensor = pipe._encode_vae_image(image=(2 * pictures - 1).to(device, pipe.vae.dtype), generator=None)
        return latents.float()

    @staticmethod
    def start_call(pipe: Any, call: dict[str, Any], **attributes: Any) -> None:
        """Set what the stock call sets on its pipeline before it encodes anything."""
        if "guidance_scale" in call:
            pipe._guidance_scale = call["guidance_scale"]
        pipe._current_timestep = None
        pipe._interrupt = False
        for name, value in attributes.items():
            setattr(pipe, name, value)

    def edit_state(
        self, pipe: Any, call: dict[str, Any], config: SpecEditConfig, conditioning: PromptConditioning,
        latents: tuple[Tensor, Tensor], grids: tuple[TokenGrid, TokenGrid | GridSet], **more: Any,
    ) -> EditState:  # fmt: skip
        """The state of a prepared call. latents, grids: of the output's noise and of the references."""
        (noise, reference), (grid, reference_grid) = latents, grids
        expected = (len(conditioning.prompt_embeds), grid.tokens, pipe.transformer.config.in_channels)
        if noise.shape != expected:
            raise ValueError(f"latents: expected shape {expected}, got {tuple(noise.shape)}")
        return EditState(
            grid=grid,
            noise=noise.float(),
            reference=reference.float(),
            reference_grid=reference_grid,
            generator=call["generator"],
            branches=1 if conditioning.negative is None else 2,
            pixels_per_token=self.pixels_per_token(pipe),
            backend=backend_of(config.attention),
            prompts=count_prompts(call),
            trims_last_block=self.trims_last_block(pipe, config),
            conditioning=conditioning,
            **more,
        )


def pixels_per_token(pipe: Any) -> int:
    """Pixels a side of a token: a patch of 2 x 2 latents."""
    return pipe.vae_scale_factor * 2
