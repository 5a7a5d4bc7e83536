"""The keyword overrides of `specedit.install`, for type checkers."""

from __future__ import annotations

from typing import TypedDict

from .choices import Attention, Decode, DraftCondition, KeyBias, Locked, Modulation, Restore, Rope, VerifyAt
from .forecast_options import ForecastOptions
from .method_options import Method


class Overrides(TypedDict, total=False):
    """Any fields of `SpecEditConfig`, with the types that they have there."""

    steps: tuple[int, int, int]
    boundaries: tuple[float, float]
    draft_steps: int
    draft_scale: int
    threshold: float | None
    verify_at: VerifyAt
    dilation: int
    uniform_stride: int | None
    selector: str
    restore: Restore
    pixel_restore_sigma: float
    locked: Locked
    keep_pixels: bool
    decode: Decode
    verify_coarse: bool
    key_bias: KeyBias
    rope: Rope
    attention: Attention
    forecast: str | ForecastOptions | None
    forecast_interval: int | None
    forecast_order: int | None
    forecast_weights: str | None
    draft_condition: DraftCondition
    reference_refresh: int | None
    reference_keep: float | None
    guidance_range: tuple[float, float] | None
    modulation: Modulation
    reuse_encodings: bool
    method: str | Method
