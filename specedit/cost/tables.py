"""Sizes of the released models, for the cost model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from ..config import STOCK_STEPS
from ..method.schedule import stage_sigmas
from ..method.trace import ForwardCall, stock_calls
from .forward import flops_of

TOKEN_PIXELS = 16  # side of one token in pixels: 8x VAE, 2x2 patches, or 16x VAE
CHANNELS = 64  # of a packed token: 16 latent channels, 2x2 patches
# The released editors' schedulers.
FLUX_SCHEDULER = dict(
    shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
    max_image_seq_len=4096,
)  # fmt: skip
QWEN_SCHEDULER = dict(
    shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256,
    max_image_seq_len=8192, shift_terminal=0.02,
)  # fmt: skip


def flux2_transformer(double: int, single: int, heads: int) -> dict[str, float]:
    """The configuration of a FLUX.2 transformer: so many blocks of each kind, and heads of 128."""
    return dict(
        num_layers=double, num_single_layers=single, num_attention_heads=heads, attention_head_dim=128, mlp_ratio=3.0,
        timestep_guidance_channels=256, in_channels=128,
    )  # fmt: skip


@dataclass(frozen=True)
class ModelCost:
    """Sizes of a model, for the cost model.

    config: the fields of the transformer's configuration that `transformer_flops` reads. text_tokens: length of the
    text stream, and vision_tokens those of them that stand for a condition image which `draft_condition` makes smaller.
    passes: transformer calls a step; 2 with classifier-free guidance, whose negative prompt may have
    `negative_text_tokens`. scheduler: fields of its configuration, which say at which sigmas the steps of a stage lie.
    default_steps: of the stock pipeline's call, or those that a distilled model is made for. sigmas: the adapter's own
    schedule, as a function of scheduler, tokens, start, end and steps. fixed_reference, fixed_prefix: as of the
    adapter. latent_pixels: of a token. packs: whether both guidance passes of a step are one forward pass. pooled:
    whether modulation differs from sample to sample. adapter: its name, by which methods choose their settings for a
    model.
    """

    config: Mapping[str, float]
    text_tokens: float
    passes: int
    vision_tokens: int = 0
    scheduler: Mapping[str, Any] = field(default_factory=dict, compare=False)
    default_steps: int = STOCK_STEPS
    negative_text_tokens: float | None = None
    sigmas: Callable[..., Any] = field(default=stage_sigmas, compare=False)
    fixed_reference: bool = False
    fixed_prefix: bool = False
    latent_pixels: int = 4
    packs: bool = False
    pooled: bool = False
    adapter: str = ""

    def stage_sigmas(self, tokens: int, start: float, end: float, steps: int) -> Any:
        """Sigmas (steps + 1,) of a stage of `tokens` target tokens."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(self.scheduler))
        return self.sigmas(scheduler, tokens, start, end, steps)

    @property
    def texts(self) -> tuple[float, ...]:
        """Text tokens of every guidance pass."""
        negative = self.text_tokens if self.negative_text_tokens is None else self.negative_text_tokens
        return (self.text_tokens, negative)[: self.passes]

    def stock_calls(self, image_tokens: int, steps: int = 1, samples: int = 1) -> list[ForwardCall]:
        """Stock steps over so many image tokens, half of them the reference's, with the whole text."""
        beside = image_tokens // 2
        return stock_calls(
            self.texts, image_tokens - beside, beside, steps, samples=samples, fixed_reference=self.fixed_reference,
            prefixes=1 if self.fixed_prefix else None,
        )  # fmt: skip

    def stock(self, image_tokens: int, steps: int = 1, samples: int = 1) -> float:
        """Operations of `stock_calls`."""
        return flops_of(self.stock_calls(image_tokens, steps, samples), self.config)

    @property
    def channels(self) -> int:
        """Of a packed token."""
        return int(self.config.get("in_channels", CHANNELS))


MODELS: Mapping[str, ModelCost] = MappingProxyType(
    {
        # FLUX.1-Kontext-dev: 19 double and 38 single blocks, 512 T5 tokens, distilled guidance (one pass).
        "flux-kontext": ModelCost(
            {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128},
            512,
            1,
            scheduler=FLUX_SCHEDULER,
            default_steps=28,
            pooled=True,
        ),
        # Qwen-Image-Edit: 60 double-stream blocks; the text stream holds about 1,340 vision tokens of the condition
        # image (1 MP in patches of 28 px) and about 60 words; true classifier-free guidance (two passes).
        "qwen-image-edit": ModelCost(
            {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128},
            1340 + 60,
            2,
            vision_tokens=1340,
            scheduler=QWEN_SCHEDULER,
            packs=True,
            adapter="qwen-image-edit",
        ),
        # LongCat-Image-Edit: FLUX's blocks and scheduler; the text stream holds 512 words and, between two marks, 18 x
        # 18 vision tokens of the condition image (512 px in patches of 28); classifier-free guidance (two passes).
        "longcat-image-edit": ModelCost(
            {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128},
            512 + 18 * 18 + 2,
            2,
            scheduler=FLUX_SCHEDULER,
        ),
        # Qwen-Image-2.1: 32 blocks, about 60 words and 16 tokens of the template. The vision tokens of the condition
        # image give way to its latents, so they are none of the text. Without guidance, as its pipeline's default.
        "qwen-image-2.1": ModelCost(
            dict(
                num_layers=32,
                num_attention_heads=32,
                attention_head_dim=128,
                mlp_ratio=3,
                causal_condition=True,
                in_channels=64,
            ),
            60 + 16,
            1,
            scheduler=FLUX_SCHEDULER,
            default_steps=40,
            fixed_prefix=True,
            latent_pixels=1,
            adapter="qwen-image-2.1",
        ),
        # FLUX.2: 512 tokens of text. dev has distilled guidance. The klein models are distilled to 4 steps without any;
        # their base models take twice the passes and the pipeline's default of 50 steps.
        "flux2-dev": ModelCost(flux2_transformer(8, 48, 48), 512, 1, scheduler=FLUX_SCHEDULER),
        "flux2-klein-4b": ModelCost(flux2_transformer(5, 20, 24), 512, 1, scheduler=FLUX_SCHEDULER, default_steps=4),
        "flux2-klein-9b": ModelCost(flux2_transformer(8, 24, 32), 512, 1, scheduler=FLUX_SCHEDULER, default_steps=4),
        "flux2-klein-9b-kv": ModelCost(
            flux2_transformer(8, 24, 32), 512, 1, scheduler=FLUX_SCHEDULER, default_steps=4, fixed_reference=True
        ),
    }
)
