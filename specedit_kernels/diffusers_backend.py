"""`mixed_attention` as an attention backend of diffusers: `model.set_attention_backend("specedit")`."""

from __future__ import annotations

from typing import Any

import torch

from .api import mixed_attention

NAME = "specedit"
_MEMBER = "SPECEDIT"


def key_bias_from_mask(mask: torch.Tensor | None, batch: int, keys: int) -> torch.Tensor | None:
    """The per-key bias, float32 (B, N_k), of a diffusers mask.

    Args:
        mask: (B, N_k), or broadcastable to (B, 1, 1, N_k): boolean (True attends) or additive, floating point.
        batch, keys: B and N_k.

    Raises:
        TypeError: a mask of integers, such as a tokenizer's, which says neither.
        ValueError: a mask that differs between queries or heads; it has no per-key form.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attn_mask: expected a boolean or floating point mask, got {mask.dtype}")
    if mask.dim() == 2 and mask.shape == (batch, keys):
        mask = mask[:, None, None, :]
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if mask.dim() > 4 or shape[1:] != (1, 1, keys) or shape[0] not in (1, batch):
        raise ValueError(
            f"attn_mask: expected one value per key, (B, N_k) or (B, 1, 1, N_k) with B={batch} and N_k={keys}, "
            f"got shape {tuple(mask.shape)}"
        )
    mask = mask.reshape(shape[0], keys)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill(~mask, float("-inf"))
    return mask.float().expand(batch, keys)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """diffusers' attention call; query (B, N_q, H, D), key and value (B, N_k, H, D).

    With `enable_gqa` key and value may have fewer heads, H a multiple of theirs; they are not repeated in memory.

    Raises:
        TypeError: a mask of integers.
        RuntimeError: on a GPU, tensors that require a gradient.
        ValueError: dropout, causal masks, masks that differ between queries, and context parallelism, none of which
            this kernel does; fewer key heads without `enable_gqa`. Nothing falls back to another backend.
    """
    if dropout_p:
        raise ValueError(f"dropout_p: expected 0, got {dropout_p}")
    if is_causal:
        raise ValueError("is_causal: expected False, got True")
    if _parallel_config is not None:
        raise ValueError("expected no context parallelism, got a parallel config")
    if not enable_gqa and key.shape[2] != query.shape[2]:
        raise ValueError(
            f"enable_gqa: expected True for {query.shape[2]} query heads and {key.shape[2]} key heads, got False"
        )
    bias = key_bias_from_mask(attn_mask, query.shape[0], key.shape[1])
    return mixed_attention(query, key, value, key_bias=bias, scale=scale, return_lse=return_lse)


class Registration:
    """A registration that `remove()` undoes. Also a context manager."""

    def __init__(self, added: bool, active_before: Any):
        self._added = added
        self._active_before = active_before

    def remove(self) -> None:
        """Remove the backend from diffusers, and restore the previous active one if it was "specedit".

        Models that were set to it need `reset_attention_backend()` of their own. Removing twice does nothing, and
        only the registration that added the backend removes it.
        """
        if not self._added:
            return
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

        member = AttentionBackendName._member_map_.pop(_MEMBER)
        AttentionBackendName._member_names_.remove(_MEMBER)
        del AttentionBackendName._value2member_map_[NAME]
        type.__delattr__(AttentionBackendName, _MEMBER)
        for table in ("_backends", "_constraints", "_supported_arg_names"):
            getattr(_AttentionBackendRegistry, table).pop(member)
        if _AttentionBackendRegistry._active_backend == member:
            _AttentionBackendRegistry._active_backend = self._active_before  # 0.36 has no setter
        self._added = False

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def register_diffusers_backend() -> Registration:
    """Register "specedit" as an attention backend of diffusers.

    After it, `model.set_attention_backend("specedit")` and `with attention_backend("specedit"):` run
    `mixed_attention`: Triton on CUDA tensors, plain PyTorch on the CPU.

    Returns:
        A registration whose `remove()` restores diffusers exactly as it was. Registering twice is harmless.

    Raises:
        ImportError: diffusers is missing or has no attention backends (it needs 0.36 or newer).
    """
    try:
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
    except ImportError as error:
        raise ImportError("expected diffusers 0.36 or newer, which has attention backends") from error
    active = _AttentionBackendRegistry._active_backend
    if _MEMBER in AttentionBackendName.__members__:
        return Registration(False, active)
    # diffusers looks names up in a closed Enum, so add a member.
    member = str.__new__(AttentionBackendName, NAME)
    member._name_, member._value_ = _MEMBER, NAME
    member._sort_order_ = len(AttentionBackendName._member_names_)
    type.__setattr__(AttentionBackendName, _MEMBER, member)
    AttentionBackendName._member_names_.append(_MEMBER)
    AttentionBackendName._member_map_[_MEMBER] = member
    AttentionBackendName._value2member_map_[NAME] = member
    _AttentionBackendRegistry.register(member)(attention)
    return Registration(True, active)
