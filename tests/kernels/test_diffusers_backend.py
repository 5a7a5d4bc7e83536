"""The diffusers attention backend: same results as the native one, and nothing left behind."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend

from specedit_kernels import register_diffusers_backend
from specedit_kernels.diffusers_backend import attention, key_bias_from_mask


def snapshot():
    tables = ("_backends", "_constraints", "_supported_arg_names", "_supports_context_parallel")
    return (
        dict(AttentionBackendName.__members__), list(AttentionBackendName), dict(AttentionBackendName.__dict__),
        dict(AttentionBackendName._value2member_map_), list(AttentionBackendName._member_names_),
        [type(t)(t) for t in (getattr(_AttentionBackendRegistry, name) for name in tables)],
        _AttentionBackendRegistry._active_backend,
    )  # fmt: skip


def tiny_flux(device):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    ).to(device).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 12, 16), "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 16), "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.randint(4, (12, 3)).float(), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    return model, {name: x.to(device) for name, x in inputs.items()}


@torch.no_grad()
def test_a_model_on_the_backend(device):
    model, inputs = tiny_flux(device)
    want = model(**inputs, return_dict=False)[0]
    before = snapshot()
    with register_diffusers_backend():
        model.set_attention_backend("specedit")
        got = model(**inputs, return_dict=False)[0]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        assert all(b.attn.processor._attention_backend == "specedit" for b in model.transformer_blocks)
        model.reset_attention_backend()
    assert snapshot() == before
    assert torch.equal(model(**inputs, return_dict=False)[0], want)


def test_registering_twice_and_the_active_backend():
    before = snapshot()
    first = register_diffusers_backend()
    second = register_diffusers_backend()
    second.remove()
    assert AttentionBackendName("specedit") is AttentionBackendName.SPECEDIT
    with attention_backend("specedit"):
        assert _AttentionBackendRegistry.get_active_backend()[1] is attention
    _AttentionBackendRegistry._active_backend = AttentionBackendName("specedit")
    first.remove()
    first.remove()
    assert snapshot() == before
    with pytest.raises(ValueError, match="specedit"):
        AttentionBackendName("specedit")


def test_masks_become_biases(device, rng):
    q, k, v = (torch.randn(2, n, 4, 16, generator=rng).to(device) for n in (7, 9, 9))
    keep = torch.rand(2, 9, generator=rng).to(device) > 0.4
    keep[:, 0] = True
    additive = torch.randn(2, 1, 1, 9, generator=rng).to(device)
    for mask, native in ((keep, keep[:, None, None]), (keep[:, None, None], keep[:, None, None]), (additive, additive),
                         (additive[0, 0, 0], additive[:1])):  # fmt: skip
        want = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=native
        ).transpose(1, 2)
        torch.testing.assert_close(attention(q, k, v, attn_mask=mask), want)
    assert key_bias_from_mask(None, 2, 9) is None
    grouped = attention(q, k[:, :, :2], v[:, :, :2], enable_gqa=True)
    repeated = [x[:, :, :2].repeat_interleave(2, dim=2) for x in (k, v)]
    torch.testing.assert_close(grouped, attention(q, *repeated))


def test_bad_input():
    q = torch.zeros(2, 4, 1, 16)
    for arguments, text in [
        ({"dropout_p": 0.1}, "dropout_p: expected 0, got 0.1"),
        ({"is_causal": True}, "is_causal: expected False"),
        ({"attn_mask": torch.zeros(2, 1, 4, 4)}, r"one value per key.*got shape \(2, 1, 4, 4\)"),
        ({"attn_mask": torch.zeros(3, 1, 1, 4)}, "one value per key"),
        ({"_parallel_config": object()}, "context parallelism"),
    ]:
        with pytest.raises(ValueError, match=text):
            attention(q, q, q, **arguments)
    with pytest.raises(TypeError, match=r"attn_mask: expected a boolean or floating point mask, got torch\.int64"):
        attention(q, q, q, attn_mask=torch.ones(2, 4, dtype=torch.long))


def test_diffusers_registry_is_restored():
    """The internals this backend leans on; a diffusers that moves them should fail here, not in a user's run."""
    assert set(attention_dispatch._AttentionBackendRegistry._supported_arg_names[AttentionBackendName.NATIVE]) <= {
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "return_lse",
        "_parallel_config",
    }  # fmt: skip
