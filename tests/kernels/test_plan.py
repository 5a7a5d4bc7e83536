"""Plans: made once for sequences of some lengths, and the same results as without."""

import math

import pytest
import torch

import specedit_kernels as kernels
from tests.kernels.test_attention import LENGTHS, expected, packed


def planned(cu_q, cu_k, q, k, backend, **more):
    return kernels.plan(
        cu_q, cu_k, total_q=len(q), total_k=len(k), head_dim=q.shape[2], dtype=q.dtype, backend=backend, **more
    )


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_plan_changes_nothing(backend, dtype, device, rng, as_good, lengths):
    q, k, v, cu_q, cu_k = packed(rng, device, dtype, 2, 32, *lengths)
    areas = 4.0 ** torch.randint(0, 3, (len(k),), generator=rng).to(device)
    plan = planned(cu_q, cu_k, q, k, backend, areas=areas, max_seqlen_q=max(lengths[0]))
    exact = expected(q, k, v, cu_q, cu_k, areas.log(), 32**-0.5, torch.float64)
    same = expected(q, k, v, cu_q, cu_k, areas.log(), 32**-0.5, dtype)
    out, lse = kernels.mixed_attention(q, k, v, plan=plan, return_lse=True, backend=backend)
    as_good(out, exact[0], same[0])
    as_good(lse, exact[1], same[1])


def test_a_call_brings_the_bias_that_its_plan_lacks(backend, device, rng):
    q, k, v, cu_q, cu_k = packed(rng, device, torch.float32, 2, 32, [20, 7], [30, 41])
    bias = torch.randn(71, generator=rng).to(device)
    plan = planned(cu_q, cu_k, q, k, backend)
    got = kernels.mixed_attention(q, k, v, plan=plan, key_bias=bias, backend=backend)
    want = kernels.mixed_attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, key_bias=bias, backend=backend)
    assert torch.equal(got, want)


def test_what_a_plan_has_is_not_given_again(backend, device, rng):
    q, k, v, cu_q, cu_k = packed(rng, device, torch.float32, 2, 32, [20, 7], [30, 41])
    bias = torch.zeros(71, device=device)
    plan = planned(cu_q, cu_k, q, k, backend, key_bias=bias)
    for name, value in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k), ("max_seqlen_q", 20), ("key_bias", bias)):
        with pytest.raises(ValueError, match=f"{name}: expected None with a plan"):
            kernels.mixed_attention(q, k, v, plan=plan, **{name: value}, backend=backend)


def test_bad_plans_are_rejected(backend, device):
    cu, good = torch.tensor([0, 3, 6], dtype=torch.int32, device=device), {"head_dim": 16, "dtype": torch.float32}
    sizes = {"total_q": 6, "total_k": 6}
    for arguments, error, text in (
        ({"areas": torch.ones(6), "key_bias": torch.zeros(6)}, ValueError, "areas: expected None with a key_bias"),
        ({"areas": torch.ones(5)}, ValueError, r"key_bias: expected shape \(6,\)"),
        ({"key_bias": torch.zeros(6).half()}, TypeError, "key_bias: expected dtype float32"),
        ({"dtype": torch.int32}, TypeError, "q: expected dtype"),
        ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q: expected at least 0"),
        ({"backend": "flash"}, ValueError, "backend: expected one of"),
        ({"total_q": 7, "backend": "torch"}, ValueError, "cu_seqlens_q: expected offsets from 0 to 7, got 0 to 6"),
    ):
        arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        if "cu_seqlens" in text and device.type == "cuda":
            continue  # offsets are not read there
        with pytest.raises(error, match=text):
            kernels.plan(cu, cu, **{"backend": backend, **good, **sizes, **arguments})
    with pytest.raises(TypeError, match="cu_seqlens_q: expected dtype int32"):
        kernels.plan(cu.long(), cu, **good, **sizes, backend=backend)


def test_a_plan_moves_with_its_tensors(device):
    cu = torch.tensor([0, 3, 6], dtype=torch.int32, device=device)
    plan = kernels.plan(
        cu, cu, total_q=6, total_k=6, head_dim=16, dtype=torch.float32, areas=torch.full((6,), 4.0, device=device)
    )
    torch.testing.assert_close(plan.key_bias, torch.full((6,), math.log(4), device=device))
    assert plan.to(device) is plan
    moved = plan.to("meta")
    assert moved.cu_seqlens_q.is_meta and moved.key_bias.is_meta and moved.tile_rows == plan.tile_rows


def test_a_plan_serves_a_compiled_call(rng):
    q, k, v, cu_q, cu_k = packed(rng, "cpu", torch.float32, 2, 32, [20, 7], [30, 41])
    plan = planned(cu_q, cu_k, q, k, None)
    compiled = torch.compile(lambda q, k, v, plan: kernels.mixed_attention(q, k, v, plan=plan), backend="eager",
                             fullgraph=True)  # fmt: skip
    torch.testing.assert_close(compiled(q, k, v, plan), kernels.mixed_attention(q, k, v, plan=plan))
