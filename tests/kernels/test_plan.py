"""Plans: made once for sequences of some lengths, and the same results as without."""

import dataclasses
import math
import os

import pytest
import torch

import specedit_kernels as kernels
from tests.kernels.shipped import fitting
from tests.kernels.test_attention import LENGTHS, expected, packed, softmax_attention


def planned(cu_q, cu_k, q, k, backend, **more):
    return kernels.plan(
        cu_q, cu_k, total_q=len(q), total_k=len(k), head_dim=q.shape[2], dtype=q.dtype, backend=backend, **more
    )


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_plan_changes_nothing(backend, dtype, device, rng, as_good, lengths):
    lengths = fitting(lengths, dtype)
    q, k, v, cu_q, cu_k = packed(rng, device, dtype, 2, 32, *lengths)
    areas = 4.0 ** torch.randint(0, 3, (len(k),), generator=rng).to(device)
    plan = planned(cu_q, cu_k, q, k, backend, areas=areas, max_seqlen_q=max(lengths[0]))
    exact = expected(q, k, v, cu_q, cu_k, areas.log(), 32**-0.5, torch.float64)
    same = expected(q, k, v, cu_q, cu_k, areas.log(), 32**-0.5, dtype)
    out, lse = kernels.mixed_attention(q, k, v, plan=plan, return_lse=True, backend=backend)
    as_good(out, exact[0], same[0])
    as_good(lse, exact[1], same[1])


def runs(keys, generator):
    """A bias that is constant over long runs of keys, hides a run, and differs within another."""
    bias = torch.zeros(keys)
    bias[keys // 4 : keys // 2] = math.log(4)
    bias[keys // 2 : 5 * keys // 8] = -math.inf
    bias[-keys // 5 :] = torch.randn(len(bias[-keys // 5 :]), generator=generator)
    return bias


@pytest.mark.parametrize("heads, dim, scale", [(2, 64, None), (1, 48, None), (2, 64, -0.1)])
def test_runs_of_one_bias_give_what_single_biases_give(backend, dtype, device, rng, as_good, heads, dim, scale):
    lengths = fitting([[70, 0, 3], [650, 40, 129]], dtype)
    q, k, v, cu_q, cu_k = packed(rng, device, dtype, heads, dim, *lengths)
    bias = torch.cat([runs(n, rng) for n in lengths[1]]).to(device)
    used = dim**-0.5 if scale is None else scale
    exact, same = (expected(q, k, v, cu_q, cu_k, bias, used, one) for one in (torch.float64, dtype))
    plan = planned(cu_q, cu_k, q, k, backend, key_bias=bias)
    out, lse = kernels.mixed_attention(q, k, v, plan=plan, scale=scale, return_lse=True, backend=backend)
    as_good(out, exact[0], same[0])
    as_good(lse, exact[1], same[1])


def test_dense_batches_are_planned_for_their_bias(backend, dtype, device, rng, as_good):
    ((queries, keys),) = fitting([[40, 333]], dtype)
    q, k, v = (torch.randn(2, n, 2, 64, generator=rng).to(device, dtype) for n in (queries, keys, keys))
    bias = torch.stack([runs(keys, rng), torch.full((keys,), -math.inf)]).to(device)
    plan = kernels.plan(total_q=queries, total_k=keys, head_dim=64, dtype=dtype, key_bias=bias, backend=backend)
    out = kernels.mixed_attention(q, k, v, plan=plan, backend=backend)
    for b in range(2):
        exact, same = (softmax_attention(q[b], k[b], v[b], bias[b], 0.125, one)[0] for one in (torch.float64, dtype))
        as_good(out[b], exact, same)
    with pytest.raises(ValueError, match="key_bias: expected a bias or areas without cu_seqlens"):
        kernels.plan(total_q=queries, total_k=keys, head_dim=64, dtype=dtype, backend=backend)


def test_blocks_of_keys_are_listed_by_what_their_bias_needs(backend, device, rng):
    if backend != "triton":
        pytest.skip("plain PyTorch lists none")
    bias = torch.tensor([0.0] * 16 + [1.0] * 16 + [-math.inf] * 16 + [0.0, 1.0] * 8 + [2.0] * 9, device=device)
    plan = kernels.plan(total_q=5, total_k=73, head_dim=16, dtype=torch.float32, key_bias=bias[None], backend=backend)
    assert plan.tile_keys == 16 and plan.key_counts.tolist() == [[2, 1]]
    assert plan.key_order[:2].tolist() == [0, 1] and plan.key_order[3] == 3  # the hidden block leaves a gap
    torch.testing.assert_close(plan.tile_bias[:2].cpu(), torch.tensor([0.0, 1 / math.log(2)]))


def test_a_plan_for_other_sequences_stays_within_the_tensors(backend, device, rng):
    """cu_seqlens may change under a graph that holds a plan: nothing outside is read."""
    if backend != "triton":
        pytest.skip("plain PyTorch reads no plan")
    q, k, v, cu_q, cu_k = packed(rng, device, torch.float32, 1, 16, [20, 7], [300, 41])
    plan = planned(cu_q, cu_k, q, k, backend, key_bias=torch.zeros(341, device=device))
    wrong = torch.tensor([0, 41, 341], dtype=torch.int32, device=device)
    out = kernels.mixed_attention(q, k, v, plan=dataclasses.replace(plan, cu_seqlens_k=wrong), backend=backend)
    assert out.isfinite().all()


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
        ({"areas": torch.ones(2, 3)}, ValueError, "key_bias: expected 1 dimensions"),
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


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="operators run compiled kernels")
def test_a_plan_serves_a_compiled_call(rng):
    q, k, v, cu_q, cu_k = packed(rng, "cpu", torch.float32, 2, 32, [20, 7], [30, 41])
    plan = planned(cu_q, cu_k, q, k, None)
    compiled = torch.compile(lambda q, k, v, plan: kernels.mixed_attention(q, k, v, plan=plan), backend="eager",
                             fullgraph=True)  # fmt: skip
    torch.testing.assert_close(compiled(q, k, v, plan), kernels.mixed_attention(q, k, v, plan=plan))
