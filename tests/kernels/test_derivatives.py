"""Derivatives of every operator: right through plain PyTorch, refused by Triton, and never silently zero."""

import math
import os

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import specedit_kernels as kernels

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# None is the device's own choice, on a CPU the operators of torch.library.
BACKENDS = ["torch"] if torch.cuda.is_available() else [None, "torch"]
plain = pytest.mark.skipif(INTERPRETING, reason="plain PyTorch needs no interpreter")

G = torch.Generator().manual_seed(7)


def randn(*shape):
    return torch.randn(shape, generator=G, dtype=torch.float64)


SHARED, OWN = torch.tensor([3, 0, 3]), torch.tensor([[3, 0], [1, 4]], dtype=torch.int32)
WEIGHTS, ANGLES = torch.randn(3, generator=G), torch.rand(3, 2, generator=G)
COS, SIN = ANGLES.cos(), ANGLES.sin()
CU_Q, CU_K = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 2, 2, 5], [0, 3, 4, 4]))
ONE = torch.tensor([0, 3], dtype=torch.int32)
BIAS, HIDING = torch.randn(4, generator=G), torch.tensor([0.5, -math.inf, -0.25, -math.inf])
NONE = torch.full((4,), -math.inf)


def scatter(index):
    return lambda src, out, **b: kernels.scatter_tokens(src, index, out.clone(), **b)


def packed(bias=None, lse=False):
    return lambda q, k, v, **b: kernels.mixed_attention(
        q, k, v, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, key_bias=bias, return_lse=lse, **b
    )


def dense(bias=None, lse=False):
    bias = None if bias is None else bias[None]
    return lambda q, k, v, **b: kernels.mixed_attention(q, k, v, key_bias=bias, return_lse=lse, **b)


def finite(result):
    """The lse of a query without keys is -inf whatever its logits are, so it has no derivative to compare."""
    return tuple(x.nan_to_num(neginf=0.0) for x in (result if isinstance(result, tuple) else (result,)))


def norm_rope(eps=1e-6, index=None):
    def call(q, k, v, q_weight, k_weight, **b):
        out = None if index is None else [q.new_zeros(5, 2, 4) for _ in range(3)]
        return kernels.qk_norm_rope(q, k, q_weight, k_weight, COS, SIN, eps=eps, v=v, out_index=index, out=out, **b)

    return call


def dense_qkv(heads=2, keys=4):
    return randn(1, 3, 2, 4), randn(1, keys, heads, 4), randn(1, keys, heads, 4)


def packed_qkv(heads=2):
    return randn(5, 2, 4), randn(4, heads, 4), randn(4, heads, 4)


ROPE = (randn(3, 2, 4), randn(3, 2, 4), randn(3, 2, 4), randn(4), randn(4))
CASES = {
    "gather, one index": (lambda x, **b: kernels.gather_tokens(x, SHARED, **b), (randn(2, 5, 3),)),
    "gather, index per sample": (lambda x, **b: kernels.gather_tokens(x, OWN, **b), (randn(2, 5, 3),)),
    "gather, one table": (lambda x, **b: kernels.gather_tokens(x, OWN, **b), (randn(5, 3),)),
    "scatter, one index": (scatter(SHARED[:2]), (randn(2, 2, 3), randn(2, 5, 3))),
    "scatter, index per sample": (scatter(OWN), (randn(2, 2, 3), randn(2, 5, 3))),
    "weighted_sum": (lambda x, **b: kernels.weighted_sum(x, WEIGHTS, **b), (randn(3, 2, 4),)),
    "contract": (lambda x, **b: kernels.contract_tokens(x, 0.6, **b)[0], (randn(2, 4, 4),)),
    "expand": (
        lambda x, noise, detail, **b: kernels.expand_tokens(x, 0.4, noise=noise, detail=detail, **b)[0],
        (randn(2, 4), randn(2, 4, 1, 3), randn(2, 4, 1, 3)),
    ),
    "contract, unpacked": (lambda x, **b: kernels.contract_tokens(x, 0.6, patch=1, **b)[0], (randn(2, 4, 3),)),
    "expand, unpacked": (
        lambda x, noise, detail, **b: kernels.expand_tokens(x, 0.4, noise=noise, detail=detail, patch=1, **b)[0],
        (randn(2, 3), randn(2, 3, 3), randn(2, 3, 3)),
    ),
    "attention, dense": (dense(), dense_qkv()),
    "attention, dense, bias": (dense(BIAS), dense_qkv()),
    "attention, dense, hidden keys, lse": (dense(HIDING, lse=True), dense_qkv()),
    "attention, dense, hidden keys": (dense(HIDING), dense_qkv()),
    "attention, dense, nothing visible": (dense(NONE), dense_qkv()),
    "attention, dense, nothing visible, lse": (dense(NONE, lse=True), dense_qkv()),
    "attention, dense, no keys, lse": (dense(lse=True), dense_qkv(keys=0)),
    "attention, dense, grouped, lse": (dense(BIAS, lse=True), dense_qkv(heads=1)),
    "attention, packed": (packed(), packed_qkv()),
    "attention, packed, lse": (packed(lse=True), packed_qkv()),
    "attention, packed, bias": (packed(BIAS), packed_qkv()),
    "attention, packed, hidden keys, lse": (packed(HIDING, lse=True), packed_qkv()),
    "attention, packed, grouped": (packed(HIDING), packed_qkv(heads=1)),
    "qk_norm_rope": (norm_rope(), ROPE),
    "qk_norm_rope, eps 0": (norm_rope(eps=0.0), ROPE),
    "qk_norm_rope, placed": (norm_rope(index=torch.tensor([4, 0, 2])), ROPE),
}


def function(name, backend):
    call, inputs = CASES[name]
    return lambda *args: finite(call(*args, backend=backend)), inputs


def along_a_direction(f, inputs):
    """Central differences in float64 along all-different directions, and the directions."""
    directions = tuple(torch.linspace(-1, 1.5, x.numel(), dtype=x.dtype).cos().view_as(x) for x in inputs)
    ahead, behind = (f(*(x + step * d for x, d in zip(inputs, directions))) for step in (1e-6, -1e-6))
    return tuple((a - b) / 2e-6 for a, b in zip(ahead, behind)), directions


def close(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


@pytest.mark.slow
@plain
@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_reverse_mode(name, chosen):
    f, inputs = function(name, chosen)
    leaves = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    # It leaves out results that have lost their derivative.
    want, directions = along_a_direction(f, inputs)
    sum(x.sin().sum() for x in f(*leaves)).backward()
    along = sum((x.grad * d).sum() for x, d in zip(leaves, directions))
    torch.testing.assert_close(along, sum((x.cos() * t).sum() for x, t in zip(f(*inputs), want)), atol=1e-7, rtol=1e-6)


@plain
@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_forward_mode(name, chosen):
    f, inputs = function(name, chosen)
    want, directions = along_a_direction(f, inputs)
    close(jvp(f, inputs, directions)[1], want)
    with forward_ad.dual_level():
        out = f(*(forward_ad.make_dual(x, d) for x, d in zip(inputs, directions)))
        tangents = [forward_ad.unpack_dual(x).tangent for x in out]
    close([torch.zeros_like(x) if t is None else t for x, t in zip(out, tangents)], want)


# Every case as an operator, and one of each operator as plain PyTorch, which has no rules of its own for transforms.
PLAIN = ("gather, one index", "scatter, one index", "weighted_sum", "contract", "expand", "attention, dense",
         "attention, packed", "qk_norm_rope")  # fmt: skip
NESTED = [(name, chosen) for chosen in BACKENDS for name in (PLAIN if chosen and None in BACKENDS else CASES)]


@pytest.mark.slow
@plain
@pytest.mark.parametrize("name, chosen", NESTED)
def test_nested_transforms(name, chosen):
    """vmap of jvp, jvp of vmap, grad of vmap, jvp of grad and grad of jvp, against the same without transforms."""
    f, inputs = function(name, chosen)
    want, directions = along_a_direction(f, inputs)
    stacked = [torch.stack([x, x + 0.1 * d, x]) for x, d in zip(inputs, directions)]
    along = [torch.stack([d, d, d]) for d in directions]
    each = [f(*sample) for sample in zip(*stacked)]
    close(vmap(f)(*stacked), [torch.stack(parts) for parts in zip(*each)])
    for got in (vmap(lambda *xs: jvp(f, xs, directions)[1])(*stacked), jvp(vmap(f), tuple(stacked), tuple(along))[1]):
        close([x[0] for x in got], want)
        close([x[2] for x in got], want)

    def loss(*xs):
        return sum(x.sin().sum() for x in f(*xs))

    every = tuple(range(len(inputs)))
    leaves = [x.clone().requires_grad_() for x in inputs]
    reverse = torch.autograd.grad(loss(*leaves), leaves)
    close(grad(loss, every)(*inputs), reverse)
    close([x[0] for x in vmap(grad(loss, every))(*stacked)], reverse)
    batched = grad(lambda *xs: sum(x.sin().sum() for x in vmap(f)(*xs)), every)(*stacked)
    close([x[2] for x in batched], reverse)
    forward = jvp(loss, inputs, directions)[1]
    torch.testing.assert_close(forward, sum((g * d).sum() for g, d in zip(reverse, directions)), atol=1e-9, rtol=1e-9)
    over = jvp(grad(loss, every), inputs, directions)[1]
    under = grad(lambda *xs: jvp(loss, xs, directions)[1], every)(*inputs)
    close(over, under)


@plain
@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize(
    "name", ["gather, index per sample", "attention, packed", "attention, dense, bias", "qk_norm_rope"]
)
def test_jacobians_and_hessians(name, chosen):
    f, inputs = function(name, chosen)

    def one(x):
        return f(x, *inputs[1:])[0]

    forward, reverse = jacfwd(one)(inputs[0]), jacrev(one)(inputs[0])
    torch.testing.assert_close(forward, reverse)
    assert reverse.any()

    def loss(x):
        return one(x).square().sum()

    torch.testing.assert_close(hessian(loss)(inputs[0]), jacrev(jacrev(loss))(inputs[0]))


@plain
@pytest.mark.parametrize("chosen", BACKENDS)
def test_an_index_for_each_sample_of_vmap(chosen):
    x, index = randn(3, 5, 2), torch.tensor([[0, 4], [1, 1], [3, 2]])
    want = torch.stack([x[i, index[i]] for i in range(3)])
    gather = lambda x, index: kernels.gather_tokens(x, index, backend=chosen)  # noqa: E731
    assert torch.equal(vmap(gather)(x, index), want)
    assert torch.equal(vmap(gather, (None, 0))(x[0], index), x[0, index])
    tangent = vmap(lambda x, i: jvp(lambda y: gather(y, i), (x,), (x,))[1])(x, index)
    assert torch.equal(tangent, want)


@plain
@pytest.mark.parametrize("chosen", BACKENDS)
def test_bias_weights_and_angles(chosen):
    """The float32 arguments, in both modes, against the same formula written out."""
    q, k, v = dense_qkv()
    stack, fine = CASES["weighted_sum"][1][0], (ANGLES, ROPE)
    bias = BIAS[None].clone()

    def attention(bias):
        return kernels.mixed_attention(q, k, v, key_bias=bias, return_lse=True, backend=chosen)

    def written_out(bias):
        logits = torch.einsum("bnhd,bkhd->bhnk", q, k) / 2 + bias[:, None, None, :]
        return torch.einsum("bhnk,bkhd->bnhd", logits.softmax(-1), v), logits.logsumexp(-1)

    def rope(angles):
        q, k, _, q_weight, k_weight = fine[1]
        return kernels.qk_norm_rope(q, k, q_weight, k_weight, angles.cos(), angles.sin(), backend=chosen)[0]

    def turned(angles):
        q, _, _, weight, _ = fine[1]
        y = torch.nn.functional.rms_norm(q, (4,), weight, 1e-6)
        c, s = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
        return torch.stack([y[..., ::2] * c - y[..., 1::2] * s, y[..., 1::2] * c + y[..., ::2] * s], -1).flatten(-2)

    for call, same, x in (
        (attention, written_out, bias),
        (lambda bias: attention(bias)[0], lambda bias: written_out(bias)[0], bias),
        (lambda w: kernels.weighted_sum(stack, w, backend=chosen),
         lambda w: torch.einsum("k,kab->ab", w.double(), stack), WEIGHTS),
        (rope, turned, ANGLES),
    ):  # fmt: skip
        for mode in (jacfwd, jacrev):
            got, want = mode(call)(x), mode(same)(x.double())
            torch.testing.assert_close(got, want, check_dtype=False, atol=1e-6, rtol=1e-5)


@plain
def test_operators_themselves_carry_derivatives():
    """Called below the public functions they are what plain PyTorch is, in both modes."""
    operator = torch.ops.specedit_kernels.gather_tokens
    x = randn(2, 5, 3)
    assert torch.equal(jvp(lambda x: operator(x, OWN), (x,), (x,))[1], operator(x, OWN))
    assert torch.equal(jvp(vmap(lambda x: operator(x, SHARED)), (x,), (x,))[1], operator(x, SHARED))
    (gradient,) = torch.autograd.grad(operator(x.requires_grad_(), SHARED).sum(), x)
    assert torch.equal(gradient[0, :, 0], torch.tensor([1.0, 0, 0, 2, 0], dtype=torch.float64))


@plain
def test_autograd_sees_in_place_writes():
    """What a backward pass needs must not be written over silently."""
    weight, out = randn(1, 5, 3).requires_grad_(), randn(1, 5, 3)
    loss = (weight * out).sum()
    kernels.scatter_tokens(randn(1, 2, 3), SHARED[:2], out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@plain
@pytest.mark.parametrize("call", [
    lambda s: kernels.expand_tokens(randn(2, 4), s), lambda s: kernels.contract_tokens(randn(2, 4, 4), s),
])  # fmt: skip
def test_noise_level_with_a_derivative_is_rejected(call):
    sigma = torch.tensor(0.5)
    with pytest.raises(RuntimeError, match=r"sigma.*: expected a number, got a tensor with a derivative"):
        call(sigma.clone().requires_grad_())
    with pytest.raises(RuntimeError, match=r"sigma.*: expected a number, got a tensor with a derivative"):
        jvp(lambda s: call(s)[0], (sigma,), (sigma,))
    with torch.no_grad():
        call(sigma.clone().requires_grad_())


@pytest.mark.skipif("triton" not in kernels.available_backends(), reason="needs a GPU or Triton's interpreter")
@pytest.mark.parametrize("name", CASES)
def test_triton_rejects_unsupported_calls(name, device):
    call, inputs = CASES[name]
    inputs = tuple(x.to(device, torch.float32) for x in inputs)

    def f(*args):
        return call(*args, backend="triton")

    if device.type == "cuda":
        pytest.skip("the cases' indices lie on the CPU")
    for attempt in (
        lambda: jvp(f, inputs, inputs),
        lambda: vmap(lambda x: jvp(lambda y: f(y, *inputs[1:]), (x,), (x,)))(inputs[0][None]),
        lambda: jacfwd(lambda x: f(x, *inputs[1:]))(inputs[0]),
    ):
        with pytest.raises(RuntimeError, match='not differentiable in forward mode, use backend="torch"'):
            attempt()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="not differentiable in forward mode"):
        f(*(forward_ad.make_dual(x, x) for x in inputs))
    with pytest.raises(RuntimeError, match="which Triton kernels do not give"):
        grad(lambda x: sum(y.sum() for y in finite(f(x, *inputs[1:]))))(inputs[0])
    with pytest.raises(RuntimeError, match=r"expected no torch.func transform in Triton's interpreter"):
        vmap(f)(*(x[None] for x in inputs))


@pytest.mark.slow
@plain
@pytest.mark.parametrize("name", ["gather, one index", "attention, dense", "attention, packed", "qk_norm_rope"])
def test_compiled_forward_mode_raises_instead_of_returning_zero(name):
    """torch.compile traces through the transform: the derivative is right, or an error says that there is none."""
    f, inputs = function(name, None)
    want, directions = along_a_direction(f, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: jvp(f, args, directions)[1], backend="aot_eager")
    try:
        got = compiled(*inputs)
    except (RuntimeError, NotImplementedError):
        return
    close(got, want)
