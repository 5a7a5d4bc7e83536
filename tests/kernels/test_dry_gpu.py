"""Every launch under the documented limits of the driver, through Triton's own launcher, without a GPU.

`benchmarks/dry_gpu` checks arguments and runs nothing. Code is not generated here: compile_check does that for every
configuration. A case that breaks a rule makes the driver return an error, which Triton raises.
"""

import functools
import json
import math
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import specedit_kernels as kernels
from benchmarks import dry_gpu
from specedit_kernels import ready

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(dry_gpu.missing()), reason=str(dry_gpu.missing()))]
BF16 = torch.bfloat16
MANY = 70_000  # samples: more than the 65,535 that axes y and z of a grid allow


@pytest.fixture(params=[(8, 0), (9, 0)], ids=str)
def gpu(request):
    """sm_80 loads through pointers, and sm_90 through tensor maps; sm_100 shares the host code of these."""
    with dry_gpu.use(request.param, generates=False) as gpu:
        yield gpu
        assert gpu.errors == []


# sm_100 has other tiles of attention; launch parameters of the other kernels are equal on all three.
TILES = [(8, 0), (9, 0), pytest.param((10, 0), marks=pytest.mark.thorough)]
every_tile = pytest.mark.parametrize("gpu", TILES, ids=str, indirect=True)
alike = pytest.mark.parametrize("gpu", [(9, 0)], ids=str, indirect=True)


def test_only_attention_differs_between_architectures():
    from specedit_kernels.gpu import launch

    own = ("gpu", "capability", "attention", "attention_tma")
    tables = [json.loads(path.read_text()) for path in launch.CONFIG_FOLDER.glob("default_*.json")]
    shared = [{name: value for name, value in table.items() if name not in own} for table in tables]
    assert len(shared) == 3 and shared[0] == shared[1] == shared[2] and "copy_rows" in shared[0]


def has_tma(gpu):
    return gpu.capability >= (9, 0)


def offsets(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@every_tile
def test_attention_at_every_head_dim(gpu):
    # Every multiple of 16 where tensor maps compile fastest, else every padded width.
    half = range(16, 257, 16) if gpu.capability == (9, 0) else (16, 32, 64, 112, 128, 256)
    for dtype, dims in ((BF16, half), (torch.float32, (16, 48, 128))):
        for dim in dims:
            q = torch.zeros(1, 130, 3, dim, dtype=dtype)
            out = kernels.mixed_attention(q, q, q)
            assert out.shape == q.shape and out.dtype == dtype
    assert gpu.kernels == ["attend"] * (len(half) + 3)
    assert gpu.maps == (3 * len(half) if has_tma(gpu) else 0)


def layouts():
    """Name, q, k, v of layouts that a model or a user may hand over."""
    whole = torch.zeros(2, 200, 4, 64, dtype=BF16)
    yield "stride-0 batch", whole[:1].expand(2, -1, -1, -1), whole, whole
    yield "stride-0 keys", whole, whole[:1].expand(2, -1, -1, -1), whole[:1].expand(2, -1, -1, -1)
    heads_first = torch.zeros(2, 4, 200, 64, dtype=BF16).transpose(1, 2)
    yield "transposed views", heads_first, heads_first, heads_first
    fused = torch.zeros(2, 200, 3, 4, 64, dtype=BF16)
    yield "slices of a fused projection", *fused.unbind(2)
    yield "slices along tokens and heads", whole[:, 3:100, 1:3], whole[:, ::2, 2:], whole[:, ::2, 2:]
    odd = torch.zeros(2 * 200 * 4 * 64 + 1, dtype=BF16)[1:].view_as(whole)
    yield "odd pointers", odd, odd, odd
    narrow = torch.zeros(2, 200, 4, 65, dtype=BF16)[..., :64]
    yield "odd strides", narrow, narrow, narrow
    yield "every other channel", *[torch.zeros(2, 200, 4, 128, dtype=BF16)[..., ::2]] * 3
    yield "one query, one key", whole[:, :1], whole[:, :1], whole[:, :1]
    yield "no queries", whole[:, :0], whole, whole
    yield "no keys", whole, whole[:, :0], whole[:, :0]
    yield "no samples", whole[:0], whole[:0], whole[:0]
    many = torch.zeros(MANY, 1, 4, 64, dtype=BF16)
    yield "many samples", many, many, many
    yield "shared key heads", whole, whole[:, :, :2], whole[:, :, 2:]


@every_tile
def test_dense_attention_of_any_layout(gpu):
    for name, q, k, v in layouts():
        before = gpu.launches
        bias = torch.zeros(k.shape[:2])[:, : k.shape[1]]
        out, lse = kernels.mixed_attention(q, k, v, key_bias=bias, return_lse=True)
        assert out.shape == q.shape and lse.shape == (q.shape[0], q.shape[2], q.shape[1]), name
        assert gpu.launches - before == (1 if q.numel() else 0), name


@every_tile
def test_packed_attention_of_any_lengths(gpu):
    for queries, keys, launches in (
        ([100], [70], 1),
        ([5, 0, 300], [0, 20, 150], 2),
        ([0, 0, 0], [1, 2, 3], 0),
        ([1, 2], [0, 0], 2),
        ([1] * MANY, [1] * MANY, 2),
    ):
        before = gpu.launches
        q, k = (torch.zeros(sum(n), 2, 64, dtype=BF16) for n in (queries, keys))
        for longest in (None, max(queries)):
            kernels.mixed_attention(
                q, k, k, cu_seqlens_q=offsets(*queries), cu_seqlens_k=offsets(*keys), max_seqlen_q=longest
            )
        assert gpu.launches - before == 2 * launches, (queries[:4], keys[:4])


@alike
def test_a_prepared_launch_is_the_one_that_triton_would_choose(gpu, monkeypatch):
    """What makes two calls alike leaves nothing out on which Triton specialises, with tensor maps and with pointers."""
    from specedit_kernels.gpu.prepared import Launch

    stock, repeated = Launch.__call__, []

    def compared(self, *arguments):
        if self._compiled is not None:
            described = [self._descriptors[at](x) if at in self._descriptors else x for at, x in enumerate(arguments)]
            assert self._kernel.warmup(*described, grid=self._grid, **self._options) is self._compiled
            repeated.append(self._kernel)
        stock(self, *arguments)

    monkeypatch.setattr(ready, "_FOUND", {})
    monkeypatch.setattr(Launch, "__call__", compared)

    def biased():
        q = torch.zeros(1, 200, 4, 64, dtype=BF16)
        for bias in (torch.zeros(1, 200), torch.zeros(1, 201)[:, 1:], torch.zeros(200, 2)[:, :1].T):
            kernels.mixed_attention(q, q, q, key_bias=bias)
            kernels.mixed_attention(q.half(), q.half(), q.half(), key_bias=bias, scale=-1.0)

    for name, q, k, v in layouts():
        if name != "many samples":
            kernels.mixed_attention(q, k, v)
    for calls in (test_packed_attention_of_any_lengths, test_lists_of_blocks):
        calls(gpu)
        calls(gpu)
    for calls in (test_tokens_of_any_layout, test_norms_and_rotations_of_any_layout, test_sums_of_any_shape):
        for _ in range(2):
            gpu.clear()
            calls(gpu)
    biased()
    biased()
    assert len(set(repeated)) == 5  # attend, plan_tiles, copy_rows, norm_rope, weighted_sum


@alike
def test_calls_that_differ_in_alignment_or_strides_alone_have_launches_of_their_own(gpu, monkeypatch):
    """After other calls each launches what it launches as the first one."""
    from specedit_kernels.gpu.prepared import Launch

    stock, launched = Launch.__call__, []

    def noted(self, *arguments):
        stock(self, *arguments)
        said = [(x.stride(), x.data_ptr() % 16) if isinstance(x, torch.Tensor) else x for x in arguments]
        launched.append((self._compiled, self._grid, said))

    monkeypatch.setattr(Launch, "__call__", noted)
    weight, angles, index = torch.ones(64, dtype=BF16), torch.zeros(40, 32), torch.arange(7)
    calls = (
        lambda x: kernels.gather_tokens(x.flatten(2), index),
        lambda x: kernels.qk_norm_rope(x, x, weight, weight, angles, angles),
        lambda x: kernels.mixed_attention(x, x, x),
    )
    memory = torch.zeros(1, 80, 2, 64, dtype=BF16)
    plain, strided = memory[:, :40], memory[:, ::2]
    moved = memory.flatten()[1:].as_strided(plain.shape, plain.stride())
    assert plain.data_ptr() % 16 == 0 and moved.data_ptr() % 16 == 2
    for call in calls:
        for other in (moved, strided):
            ready.forget()
            call(other)
            alone = launched.pop()
            ready.forget()
            call(plain)
            call(other)
            assert launched.pop() == alone != launched.pop()


def test_a_repeated_call_skips_its_checks_and_nothing_else(gpu, monkeypatch):
    """Gradients, debug mode and overlapping memory are noticed all the same."""
    q, rows = torch.zeros(1, 40, 2, 64, dtype=BF16), torch.arange(40)
    tokens, out = q.flatten(2), torch.zeros(1, 80, 128, dtype=BF16)
    for _ in range(2):
        kernels.mixed_attention(q, q, q)
        kernels.scatter_tokens(tokens, rows, out)
    calls = []
    monkeypatch.setattr(kernels.api.checks, "check_attention", lambda *args: calls.append(args))
    kernels.mixed_attention(q, q, q)
    assert not calls
    kernels.mixed_attention(q, q, q[:, :, :1])
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match=r"expected torch\.no_grad"):
        kernels.mixed_attention(q.clone().requires_grad_(), q, q, backend="triton")
    with pytest.raises(ValueError, match="out: expected no memory in common with src"):
        kernels.scatter_tokens(out[:, 20:60], rows, out)
    kernels.scatter_tokens(out[:, 20:60].clone(), rows, out)
    with pytest.raises(ValueError, match="out: expected no memory in common with src"):
        kernels.scatter_tokens(out[:, 20:60], rows, out)
    monkeypatch.setenv("SPECEDIT_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="index: expected unique values"):
        kernels.scatter_tokens(tokens, torch.zeros_like(rows), out)


def test_a_plan_serves_every_call_of_its_lengths(gpu):
    """One launch a call, where a call without a plan has two; other blocks than planned are ordered anew."""
    cu = offsets(30, 0, 70)
    q, bias = torch.zeros(100, 2, 64, dtype=BF16), torch.zeros(100)
    plan = kernels.plan(cu, cu, total_q=100, total_k=100, head_dim=64, dtype=BF16, key_bias=bias)
    gpu.clear()
    for _ in range(3):
        assert kernels.mixed_attention(q, q, q, plan=plan).shape == q.shape
    assert gpu.kernels == ["attend"] * 3
    gpu.clear()
    lists = kernels.BlockKeep.from_mask(torch.ones(3, 2, dtype=torch.bool), query_block=64, key_block=64)
    kernels.mixed_attention(q, q, q, plan=plan, block_keep=lists)
    assert gpu.kernels[-1] == "attend"
    alone = kernels.plan(offsets(100), offsets(100), total_q=100, total_k=100, head_dim=64, dtype=BF16)
    gpu.clear()
    kernels.mixed_attention(q, q, q, plan=alone, key_bias=bias)
    assert gpu.kernels == ["attend"]


@alike
def test_results_are_written_into_tensors_of_the_caller(gpu):
    q, rows, noise = torch.zeros(1, 40, 2, 64, dtype=BF16), torch.arange(20), torch.zeros(1, 40, 4, 16, 3)
    out, lse = torch.zeros_like(q), torch.zeros(1, 2, 40)
    latents, weights = torch.zeros(1, 40, 64, dtype=BF16), torch.ones(3)
    fine, some = torch.zeros(1, 40, 4, 64, dtype=BF16), torch.zeros(1, 20, 64, dtype=BF16)
    stack, summed = torch.zeros(3, 1, 40, 64, dtype=BF16), torch.zeros(1, 40, 64, dtype=BF16)
    calls = [
        lambda: kernels.mixed_attention(q, q, q, out=out) is out,
        lambda: kernels.mixed_attention(q, q, q, return_lse=True, out=(out, lse))[1] is lse,
        lambda: kernels.gather_tokens(latents, rows, out=some) is some,
        lambda: kernels.expand_tokens(latents, 0.5, noise=noise, out=fine)[0] is fine,
        lambda: kernels.contract_tokens(fine, 0.5, out=latents)[0] is latents,
        lambda: kernels.weighted_sum(stack, weights, out=summed) is summed,
    ]
    for call in calls:
        for _ in range(2):
            assert call()
    assert gpu.launches == 2 * len(calls)


def test_lists_of_blocks(gpu):
    q = torch.zeros(2, 300, 2, 64, dtype=BF16)
    for size in (64, 128):
        rows = math.ceil(300 / size)
        keep = kernels.BlockKeep.from_mask(torch.ones(rows, rows, dtype=torch.bool), query_block=size, key_block=size)
        kernels.mixed_attention(q, q, q, block_keep=keep)
    assert gpu.kernels[-2:] == ["attend"] * 2


@alike
def test_tokens_of_any_layout(gpu):
    x = torch.zeros(2, 100, 64, dtype=BF16)
    index = torch.zeros(7, dtype=torch.int64)
    inputs = [
        x, x[0], x[:1].expand(2, -1, -1), x[:, ::3], x[:, :, 1:8], x[:, :, ::2], x.transpose(1, 2),
        x.flatten()[1:-63].view(1, -1, 64), torch.zeros(MANY, 2, 64, dtype=BF16), torch.zeros(2, 9, 3072),
    ]  # fmt: skip
    for one in inputs:
        for chosen in (index, index.int(), torch.zeros(9, dtype=torch.int64)[1:8]):
            kernels.gather_tokens(one, chosen)
    assert gpu.launches == 3 * len(inputs)
    assert kernels.gather_tokens(x, index[:0]).shape == (2, 0, 64)
    for out in (x, x[:, :, 1:8], torch.zeros(MANY, 9, 64, dtype=BF16)):
        source = torch.zeros(out.shape[0], 7, out.shape[2], dtype=BF16)
        kernels.scatter_tokens(source, torch.arange(7), out)
    assert gpu.launches == 3 * len(inputs) + 3


@alike
def test_expansion_of_any_shape(gpu):
    for width, patch in ((64, 2), (16, 2), (64, 1), (128, 1)):
        for shape in ((1,), (77,), (2, 5), (MANY, 1), (0, 5), (2, 0)):
            coarse = torch.zeros(*shape, width, dtype=BF16)
            fine, _ = kernels.expand_tokens(coarse, 0.5, patch=patch, generator=torch.Generator(), backend="triton")
            noise = torch.zeros(*shape, 4, width // 4, 3) if patch == 2 else torch.zeros(*shape, width, 3)
            kernels.expand_tokens(coarse, 0.5, noise=noise, detail=noise, patch=patch)
            kernels.contract_tokens(fine, 0.5, patch=patch)
    assert gpu.launches == 4 * 4 * 3
    wide = torch.zeros(2, 9, 130, dtype=BF16)[..., 1:65]
    kernels.expand_tokens(wide, 0.5)


@alike
def test_norms_and_rotations_of_any_layout(gpu):
    def call(q, v=None, out_index=None, rows=None, tables=1):
        tokens, dim = q.shape[-3], q.shape[-1]
        angles = torch.zeros(*q.shape[: tables - 1], tokens, dim // 2)
        out = None
        if out_index is not None:
            out = [torch.zeros(*q.shape[:-3], rows, *q.shape[-2:], dtype=q.dtype) for _ in range(2 if v is None else 3)]
        kernels.qk_norm_rope(
            q, q, *[torch.ones(dim, dtype=BF16)] * 2, angles, angles, v=v, out_index=out_index, out=out
        )

    for dim in (16, 64, 96, 128, 256):
        call(torch.zeros(2, 50, 3, dim, dtype=BF16))
    q = torch.zeros(2, 50, 4, 64, dtype=BF16)
    call(q, v=q, out_index=torch.arange(50), rows=60)
    call(q[0], v=q[0])
    call(q, tables=2)
    call(torch.zeros(2, 4, 50, 64, dtype=BF16).transpose(1, 2))
    call(torch.zeros(2, 50, 3, 4, 64, dtype=BF16)[:, :, 1])
    call(torch.zeros(2 * 50 * 4 * 64 + 1, dtype=BF16)[1:].view(2, 50, 4, 64))
    call(q[:1].expand(2, -1, -1, -1))
    call(torch.zeros(MANY, 1, 2, 64, dtype=BF16))
    assert gpu.launches == 13
    call(q[:, :0])
    assert gpu.launches == 13


@alike
def test_sums_of_any_shape(gpu):
    shapes = ((1,), (3, 5, 7), (2, 4096, 64), (MANY, 3), (0, 4))
    for shape in shapes:
        for layers in (1, 3, 5):
            kernels.weighted_sum(torch.zeros(layers, *shape, dtype=BF16), torch.ones(layers))
    assert gpu.launches == 3 * (len(shapes) - 1)


@alike
def test_six_threads_may_make_the_first_call(gpu):
    q = torch.zeros(1, 300, 3, 112, dtype=BF16)  # a head dim of its own, which no other test compiled
    failed = []

    def work():
        try:
            for _ in range(3):
                kernels.mixed_attention(q, q, q, scale=-1.0)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and gpu.launches == 18


class Recorder(TorchDispatchMode):
    """Names of PyTorch's operators that run, views left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function.namespace == "aten":
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_reads(monkeypatch):
    """What makes the host wait for a GPU raises."""

    def waits(*args, **kwargs):
        raise AssertionError("read a tensor's value")

    def forbid():
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "numpy", "cpu", "nonzero"):
            monkeypatch.setattr(torch.Tensor, name, waits)

    yield forbid
    monkeypatch.undo()


def edit_of(tokens, heads=2, dim=128):
    """The operators of an edit with this many tokens: a call of each, and the number of tensors that it allocates.

    The backend is named, because PyTorch's dispatcher hides from a mode what runs inside an operator.
    """
    q = torch.zeros(1, tokens, heads, dim, dtype=BF16)
    packed = torch.zeros(2 * tokens, heads, dim, dtype=BF16)
    cu, bias = offsets(tokens // 2, 2 * tokens - tokens // 2), torch.zeros(1, tokens)
    weight, angles, rows = torch.ones(dim, dtype=BF16), torch.zeros(tokens, dim // 2), torch.arange(tokens)
    out = [torch.zeros(1, tokens + 9, heads, dim, dtype=BF16) for _ in range(3)]
    latents = torch.zeros(1, tokens, 64, dtype=BF16)
    stack, weights = torch.zeros(3, 1, tokens, 64, dtype=BF16), torch.ones(3)
    noise = torch.zeros(1, tokens, 4, 16, 3)
    gather_tokens, scatter_tokens, expand_tokens, qk_norm_rope, mixed_attention, weighted_sum = (
        functools.partial(getattr(kernels, name), backend="triton")
        for name in (
            "gather_tokens",
            "scatter_tokens",
            "expand_tokens",
            "qk_norm_rope",
            "mixed_attention",
            "weighted_sum",
        )
    )
    return {
        "gather": (lambda: gather_tokens(latents, rows[1:]), 1),
        "scatter": (lambda: scatter_tokens(latents[:, 1:], rows[1:], out[0].view(1, -1, heads * dim)[..., :64]), 0),
        "expand": (lambda: expand_tokens(latents, 0.5, noise=noise), 1),
        "norm": (lambda: qk_norm_rope(q, q, weight, weight, angles, angles, v=q, out_index=rows, out=out), 0),
        "dense": (lambda: mixed_attention(q, q, q, key_bias=bias), 1),
        "packed": (lambda: mixed_attention(packed, packed, packed, cu_seqlens_q=cu, cu_seqlens_k=cu,
                                                   key_bias=bias.repeat(1, 2)[0]), 2),
        "sum": (lambda: weighted_sum(stack, weights), 1),
    }  # fmt: skip


def test_a_second_edit_of_another_size_compiles_and_waits_for_nothing(gpu, no_reads):
    """Apart from its outputs it allocates nothing either but the small plan of a packed launch without one."""
    for call, _ in edit_of(1024).values():
        call()
    assert gpu.compiled
    gpu.clear()
    other = edit_of(1331)
    no_reads()
    for name, (call, allocations) in other.items():
        with Recorder() as recorder:
            call()
        got = [one for one in recorder.names if one != "repeat"]
        assert len(got) == allocations and all("empty" in one for one in got), (name, recorder.names)
    assert gpu.compiled == []


@alike
def test_a_token_earlier_or_later_compiles_nothing(gpu):
    """Texts have odd and even lengths, so index vectors start at any multiple of their element."""
    x, rows = torch.zeros(2, 100, 4, 64, dtype=BF16), torch.arange(60)
    weight, angles = torch.ones(64, dtype=BF16), torch.zeros(20, 32)

    def call(at):
        kernels.gather_tokens(x.flatten(2), rows[at : at + 20])
        out = [torch.zeros_like(x) for _ in range(2)]
        kernels.qk_norm_rope(
            x[:, :20], x[:, :20], weight, weight, angles, angles, out_index=rows[at : at + 20], out=out
        )

    call(0)
    gpu.clear()
    call(1)
    assert gpu.compiled == [] and gpu.launches == 2


@alike
def test_the_driver_refuses_what_breaks_a_rule(gpu):
    """Each rule of a tensor map, and those of a launch that arguments can break."""
    from triton.runtime import driver

    fill = getattr(driver.active.utils, "fill_tma_descriptor_tiled", None)
    if fill is None:
        pytest.skip("Triton 3.6 has another name for it")
    pointer = torch.zeros(4096, dtype=BF16).data_ptr()
    fine = dict(pointer=pointer, swizzle=3, size=2, kind=9, box=[1, 64], sizes=[8, 64], strides=[64, 1], padding=0)
    assert pointer % 16 == 0
    fill(*fine.values())
    for wrong, rule in (
        ({"pointer": pointer + 2}, "the address is not aligned"),
        ({"box": [1, 4]}, "the box's inner size is not a multiple of 16 bytes"),
        ({"box": [1, 128]}, "the box's inner size is above the swizzle's"),
        ({"box": [512, 64]}, "a box size is not in"),
        ({"sizes": [0, 64]}, "a size is not in"),
        ({"strides": [65, 1]}, "a stride is not a multiple of 16"),
        ({"strides": [0, 1]}, "a stride is not a multiple of 16"),
    ):
        gpu.clear()
        with pytest.raises(RuntimeError, match="refused by the dry driver"):
            fill(*(fine | wrong).values())
        assert rule in gpu.errors[0], wrong
    gpu.clear()
    from specedit_kernels.gpu.sums import weighted_sum

    x = torch.zeros(16)
    for grid, rule in (((1, 65536), "above 65535"), ((1, 1, 70000), "above 65535")):
        gpu.clear()
        with pytest.raises(RuntimeError, match="refused by the dry driver"):
            weighted_sum[grid](x, x, x, 16, ROWS=1, BLOCK=16, num_warps=4)
        assert rule in gpu.errors[0]
    gpu.clear()
