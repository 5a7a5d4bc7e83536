"""Attention merged from one unbiased pass per bias, against float64 and against PyTorch at the same precision."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from specedit_kernels import BlockKeep, KeyGroups, merged, mixed_attention, plan, reference
from tests.kernels.test_grouped_query import randn, softmax_attention

AREAS = torch.tensor([1.0, 4.0, 16.0]).log()


def areas(rng, *shape, of=AREAS):
    return of[torch.randint(len(of), shape, generator=rng)]


def offsets(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def compare(as_good, parts, out, lse):
    """parts: q, k, v and bias of every sequence, out (N, H, D) and lse (H, N) of it."""
    for part, got, got_lse in zip(parts, out, lse, strict=True):
        (exact, exact_lse), (same, same_lse) = (softmax_attention(*part, t) for t in (torch.float64, part[0].dtype))
        as_good(got, exact, same)
        as_good(got_lse, exact_lse, same_lse)


BIASES = {
    "areas": lambda rng, b, n: areas(rng, 1, n).expand(b, n),
    "areas of each sample": lambda rng, b, n: areas(rng, b, n),
    "none": lambda rng, b, n: None,
    "one area": lambda rng, b, n: torch.full((b, n), math.log(4)),
    "hidden keys": lambda rng, b, n: areas(rng, b, n, of=torch.tensor([-math.inf, 0.0, math.log(4)])),
    "a sample that sees nothing": lambda rng, b, n: torch.cat([torch.full((1, n), -math.inf), areas(rng, b - 1, n)]),
    "nothing is seen": lambda rng, b, n: torch.full((b, n), -math.inf),
}
SIZES = [(7, 13, 16), (1, 1, 64), (130, 65, 33), (0, 5, 16), (5, 0, 16)]  # queries, keys, head dim


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("kind", BIASES)
def test_dense(dtype, device, rng, as_good, kind, heads):
    for n, m, dim in SIZES:
        q = randn(rng, device, dtype, 2, n, heads[0], dim)
        k, v = (randn(rng, device, dtype, 2, m, heads[1], dim) for _ in range(2))
        bias = BIASES[kind](rng, 2, m)
        bias = None if bias is None else bias.to(device)
        out, lse = mixed_attention(q, k, v, key_bias=bias, return_lse=True, backend="merged")
        assert out.shape == q.shape and out.dtype == dtype and out.is_contiguous() and lse.dtype == torch.float32
        compare(as_good, [(q[b], k[b], v[b], None if bias is None else bias[b]) for b in range(2)], out, lse)
        into = torch.full_like(out, math.nan), torch.full_like(lse, math.nan)
        assert mixed_attention(q, k, v, key_bias=bias, return_lse=True, out=into, backend="merged") is into
        assert torch.equal(into[0], out) and torch.equal(into[1], lse)
        if bias is not None:
            groups = KeyGroups.of(bias)
            assert torch.equal(mixed_attention(q, k, v, key_groups=groups, backend="merged"), out)


PACKED = [([5], [9]), ([70, 0, 3, 130], [65, 40, 129, 1]), ([0, 33], [17, 0]), ([1] * 6, [3] * 5 + [200]), ([2], [0])]


@pytest.mark.parametrize("kind", ["areas", "none", "hidden keys", "an area in one sequence alone"])
@pytest.mark.parametrize("lengths", PACKED, ids=str)
def test_packed(dtype, device, rng, as_good, lengths, kind):
    q = randn(rng, device, dtype, sum(lengths[0]), 4, 48)
    k, v = (randn(rng, device, dtype, sum(lengths[1]), 2, 48) for _ in range(2))
    if kind in BIASES:
        bias = BIASES[kind](rng, 1, len(k))
        bias = None if bias is None else bias[0].contiguous().to(device)
    else:
        bias = torch.zeros(len(k), device=device)
        bias[: lengths[1][0] // 2] = math.log(4)
    cu = [offsets(*n).to(device) for n in lengths]
    each = {"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1], "return_lse": True, "backend": "merged"}
    out, lse = mixed_attention(q, k, v, key_bias=bias, **each)
    parts, outs, lses = [], [], []
    for a, b, c, d in zip(cu[0], cu[0][1:], cu[1], cu[1][1:]):
        parts.append((q[a:b], k[c:d], v[c:d], None if bias is None else bias[c:d]))
        outs.append(out[a:b])
        lses.append(lse[:, a:b])
    compare(as_good, parts, outs, lses)
    if bias is not None:
        sizes = {"total_q": len(q), "total_k": len(k), "head_dim": 48, "dtype": dtype}
        planned = plan(*cu, key_bias=bias, backend="merged", **sizes)
        assert torch.equal(mixed_attention(q, k, v, plan=planned, backend="merged"), out)
        groups = KeyGroups.of(bias, cu[1])
        assert torch.equal(mixed_attention(q, k, v, key_groups=groups, **each)[0], out)


def test_layouts_scales_and_float64(rng):
    """Transposed, sliced and strided views give what copies give; scales may be negative, and float64 stays float64."""
    whole = torch.randn(2, 4, 30, 64, dtype=torch.float64, generator=rng)
    bias = areas(rng, 2, 30)
    for q in (whole.transpose(1, 2), whole.transpose(1, 2)[..., ::2], whole.transpose(1, 2)[:1].expand(2, -1, -1, -1)):
        for scale in (None, -0.3, 0.0):
            got, lse = mixed_attention(q, q, q, key_bias=bias, scale=scale, return_lse=True, backend="merged")
            want, want_lse = mixed_attention(q, q, q, key_bias=bias, scale=scale, return_lse=True, backend="torch")
            torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
            torch.testing.assert_close(lse, want_lse, atol=1e-12, rtol=1e-12)


def test_every_other_function_is_pytorchs(rng):
    import specedit_kernels as kernels

    x, index = torch.randn(9, 8, generator=rng), torch.tensor([3, 0, 8])
    assert torch.equal(kernels.gather_tokens(x, index, backend="merged"), x[index])
    fine, _ = kernels.expand_tokens(x, 0.5, generator=torch.Generator().manual_seed(0), backend="merged")
    same, _ = kernels.expand_tokens(x, 0.5, generator=torch.Generator().manual_seed(0), backend="torch")
    assert torch.equal(fine, same)


def test_what_it_cannot_do_is_refused():
    q = torch.zeros(2, 9, 2, 16)
    many = torch.arange(9.0).expand(2, 9)
    groups = KeyGroups.of(torch.zeros(2, 9))
    keep = BlockKeep.from_mask(torch.ones(1, 1, dtype=torch.bool))
    for arguments, text in [
        ({"key_bias": many}, r"key_bias: expected at most 8 distinct values with backend=\"merged\".*got 9"),
        ({"key_bias": many.log().nan_to_num(nan=1) * math.nan}, "key_bias: expected finite values or -inf"),
        ({"block_keep": keep}, "block_keep: expected None with backend=\"merged\""),
        ({"key_groups": groups, "key_bias": many}, "key_groups: expected None with a key_bias"),
        ({"key_groups": KeyGroups.of(torch.zeros(2, 8))}, "key_groups: expected groups of 9 keys, got groups of 8"),
        ({"key_groups": KeyGroups.of(areas(torch.Generator(), 3, 6))}, "key_groups: expected groups of 2 sequences"),
        ({"key_groups": groups, "backend": "torch"}, "key_groups: expected None with backend='torch'"),
        ({"key_groups": groups, "backend": None}, "key_groups: expected None with backend=None"),
        ({"plan": 7}, "plan: expected what specedit_kernels.plan made, got int"),
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=text):
            mixed_attention(q, q, q, **({"backend": "merged"} | arguments))
    with pytest.raises(TypeError, match="key_groups: expected KeyGroups, got Tensor"):
        mixed_attention(q, q, q, key_groups=many, backend="merged")
    with pytest.raises(RuntimeError, match="a tensor that requires a gradient, which merged passes do not give"):
        mixed_attention(q.requires_grad_(), q, q, backend="merged")


@torch.no_grad()
def test_one_graph_for_all_lengths(rng):
    def call(q, groups):
        return mixed_attention(q, q, q, key_groups=groups, backend="merged") * 2

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (30, 41, 55):
            q, bias = torch.randn(1, n, 2, 16, generator=rng), areas(rng, 1, n)
            want = mixed_attention(q, q, q, key_bias=bias, backend="torch") * 2
            torch.testing.assert_close(compiled(q, KeyGroups.of(bias)), want, atol=1e-5, rtol=1e-5)


class OnGpu(TorchDispatchMode):
    """Stands for PyTorch's attention on CUDA: its operators with the shapes that torch/_meta_registrations.py has."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in ("_flash_attention_forward", "_scaled_dot_product_flash_attention",
                        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_efficient_attention"):  # fmt: skip
            return function(*args, **(kwargs or {}))
        self.ran.append(name)
        q, k, v = args[:3]
        scale = kwargs["scale"]
        if name == "_flash_attention_forward":
            assert q.shape[-1] % 8 == 0 and args[3].dtype == args[4].dtype == torch.int32
            assert (args[3].diff() <= args[5]).all() and (args[4].diff() <= args[6]).all()
            out, lse = mixed_attention(q, k, v, cu_seqlens_q=args[3], cu_seqlens_k=args[4], scale=scale,
                                       return_lse=True, backend="torch")  # fmt: skip
            return out, lse.masked_fill(lse == -math.inf, math.inf), *[q.new_empty(0)] * 3
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        out, lse = mixed_attention(*heads_first, scale=scale, return_lse=True, backend="torch")
        if name == "_scaled_dot_product_flash_attention":
            assert q.shape[-1] % 8 == 0
        elif name == "_scaled_dot_product_cudnn_attention":
            assert args[4] is True
            lse = lse[..., None]
        else:
            assert args[4] is True
            lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.nan)
        empty = q.new_empty(0)
        rest = (empty, empty) if "efficient" in name else (empty, empty, 37, 50, empty, empty, empty)
        return out.transpose(1, 2), lse, *rest


@pytest.mark.parametrize("chosen", ["FLASH", "CUDNN", "EFFICIENT", "MATH"])
def test_operators_of_a_gpu(rng, monkeypatch, chosen):
    """Every kernel that PyTorch may choose there, with another head dim than flash attention takes."""
    choice = getattr(SDPBackend, "MATH" if chosen == "MATH" else f"{chosen}_ATTENTION").value
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: choice)
    monkeypatch.setattr(merged, "on_cpu", lambda tensor: False)
    q, k = torch.randn(2, 37, 2, 20, generator=rng), torch.randn(2, 50, 2, 20, generator=rng)
    bias = areas(rng, 1, 50).expand(2, 50)
    want, want_lse = mixed_attention(q, k, k, key_bias=bias, return_lse=True, backend="torch")
    with OnGpu() as gpu:
        out, lse = merged.mixed_attention(q, k, k, None, None, None, bias, 20**-0.5, True)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)
    ran = {"FLASH": ["_scaled_dot_product_flash_attention"] * 3, "MATH": []}
    assert gpu.ran == ran.get(chosen, [f"_scaled_dot_product_{chosen.lower()}_attention"] * 3)


@pytest.mark.parametrize("dim", [16, 20])
def test_packed_sequences_are_one_launch_per_bias_on_a_gpu(rng, monkeypatch, dim):
    """Flash attention's variable lengths, whose lse of no keys is +inf."""
    monkeypatch.setattr(merged, "has_varlen", lambda q: True)
    q, k = torch.randn(90, 4, dim, generator=rng), torch.randn(70, 2, dim, generator=rng)
    cu_q, cu_k = offsets(30, 0, 40, 20), offsets(10, 20, 40, 0)
    for bias in (None, areas(rng, 70), torch.cat([torch.zeros(10), torch.full((60,), math.log(4))])):
        for longest in (None, 40):
            arguments = (q, k, k, cu_q, cu_k, longest, bias, dim**-0.5, True)
            with OnGpu() as gpu:
                out, lse = merged.mixed_attention(*arguments)
            want, want_lse = mixed_attention(
                q, k, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, key_bias=bias, return_lse=True, backend="torch"
            )
            torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)
            assert len(gpu.ran) == (1 if bias is None else len(bias.unique()))


def test_groups_move_and_know_what_they_hold(rng):
    bias = torch.tensor([[0.0, math.log(4), -math.inf, 0.0]])
    groups = KeyGroups.of(bias)
    assert groups.values == (0.0, pytest.approx(math.log(4))) and [r.tolist() for r in groups.rows] == [[0, 3], [1]]
    assert groups.ends == () and groups.keys == 4 and groups.to("cpu").rows[1].tolist() == [1]
    packed = KeyGroups.of(bias[0], offsets(3, 1))
    assert [end.tolist() for end in packed.ends] == [[0, 1, 2], [0, 1, 1]] and packed.complete == (True, False)
    with pytest.raises(TypeError, match="key_bias: expected dtype float32"):
        KeyGroups.of(bias.double())
    with pytest.raises(ValueError, match="cu_seqlens_k: expected offsets from 0 to 4, got 0 to 3"):
        KeyGroups.of(bias[0], offsets(3))


def test_pytorch_with_a_mask_keeps_the_precision_of_the_call(rng):
    """On another device than a CPU, half precision stays half precision: no float32 copy, no float32 logits."""
    q, bias = torch.empty(2, 40, 2, 64, dtype=torch.bfloat16, device="meta"), torch.empty(2, 40, device="meta")
    made = {}

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point() and result.numel() > bias.numel():
                made[function.__name__] = result.dtype
            return result

    with Recorder():
        out = reference.mixed_attention(q, q, q, key_bias=bias)
    assert out.dtype == torch.bfloat16 and set(made.values()) == {torch.bfloat16}
    assert "scaled_dot_product_attention" in made


def test_a_sample_that_sees_nothing_gives_zeros_whatever_a_fused_kernel_makes_of_it():
    bias = torch.zeros(2, 40)
    bias[1] = -math.inf
    out = reference.zero_where_all_is_hidden(bias, torch.full((2, 40, 2, 64), math.nan))
    assert out[0].isnan().all() and not out[1].any()


def test_groups_of_other_lengths_are_refused():
    q, bias = torch.zeros(9, 2, 16), torch.zeros(9)
    groups, other = KeyGroups.of(bias, offsets(4, 5)), offsets(5, 4)
    with pytest.raises(ValueError, match=r"key_groups: expected groups of sequences of \[5, 4\] keys, got of \[4, 5\]"):
        mixed_attention(q, q, q, cu_seqlens_q=other, cu_seqlens_k=other, key_groups=groups, backend="merged")


def test_autocast_leaves_the_dtype(rng):
    q = torch.randn(1, 9, 2, 16, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        for backend in ("merged", "torch"):
            assert mixed_attention(q, q, q, key_bias=torch.zeros(1, 9), backend=backend).dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (dict(total_q=-1), ValueError, "total_q: expected at least 0, got -1"),
        (dict(head_dim=16.0), TypeError, "head_dim: expected an integer, got 16.0"),
        (dict(dtype="float16"), TypeError, "dtype: expected a torch.dtype, got 'float16'"),
    ],
)
def test_what_a_plan_cannot_be_made_of(wrong, error, text):
    sizes = dict(total_q=9, total_k=9, head_dim=16, dtype=torch.float32)
    with pytest.raises(error, match=text):
        plan(offsets(4, 5), offsets(4, 5), **(sizes | wrong))
