"""Fields of `SpecEditConfig` that take one of a few words."""

from __future__ import annotations

from typing import Literal, get_args

VerifyAt = Literal["full", "draft"]
Restore = Literal["full", "reference", "pixels"]
Locked = Literal["coarse", "cached", "reference"]
KeyBias = Literal["area", "none"]
Rope = Literal["scaled", "phase_aligned"]
Attention = Literal["auto", "triton", "merged", "torch", "stock"]
DraftCondition = Literal["full", "small"]
Decode = Literal["full", "edited"]
Modulation = Literal["step", "once"]

CHOICES: dict[str, tuple[str, ...]] = {
    "verify_at": get_args(VerifyAt),
    "restore": get_args(Restore),
    "locked": get_args(Locked),
    "key_bias": get_args(KeyBias),
    "rope": get_args(Rope),
    "attention": get_args(Attention),
    "draft_condition": get_args(DraftCondition),
    "decode": get_args(Decode),
    "modulation": get_args(Modulation),
}


def backend_of(attention: str) -> str | None:
    """The `backend` of specedit_kernels for a setting of `attention`; None where it is chosen by device."""
    return {"auto": None, "stock": "torch"}.get(attention, attention)
