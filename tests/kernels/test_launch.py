"""Launch parameters: the files, the lookup, and every attention configuration at work."""

import importlib.util
import json
import math
import subprocess
from types import SimpleNamespace

import pytest
import torch

from specedit_kernels import available_backends, mixed_attention
from tests.kernels.shipped import attention_entries

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

import triton

from specedit_kernels import gpu, ops
from specedit_kernels.gpu import attention_launch, attention_plan, launch

runs_kernels = pytest.mark.skipif("triton" not in available_backends(), reason="needs a GPU or Triton's interpreter")
TABLES = {path.name: json.loads(path.read_text()) for path in launch.CONFIG_FOLDER.glob("*.json")}


def test_every_architecture_has_a_default():
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)):
        assert launch.default_file_name(capability) in TABLES


def test_nearest_by_log_ratio():
    entries = [{"shape": {"head_dim": d, "keys": k}, "config": {"id": (d, k)}} for d in (64, 128) for k in (1000, 8000)]
    assert launch.nearest(entries, {"head_dim": 128, "keys": 5000}) == {"id": (128, 8000)}
    assert launch.nearest(entries, {"head_dim": 16, "keys": 0}) == {"id": (64, 1000)}
    assert launch.nearest(entries[:1], {"head_dim": 256, "keys": 10**6}) == {"id": (64, 1000)}
    # An entry for another head dim is never taken because its length fits better.
    assert launch.nearest(entries[:1] + entries[2:3], {"head_dim": 128, "keys": 64}) == {"id": (128, 1000)}
    only_short = [entries[1], entries[2]]  # (64, 8000) and (128, 1000)
    assert launch.nearest(only_short, {"head_dim": 128, "keys": 8000}) == {"id": (128, 1000)}


def test_names_that_leave_the_folder_are_rejected():
    assert launch.config_file_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3.json"


def test_an_old_architecture_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(RuntimeError, match=r"expected a GPU of compute capability 8.0 or newer, got 7.5 \(Tesla T4\)"):
        ops.check_gpu(torch.device("cuda", 0))
    first = SimpleNamespace(device=torch.device("cuda", 0))  # all that a call looks at before it looks at the GPU
    for name in gpu._PREPARE:
        with pytest.raises(RuntimeError, match=r"8.0 or newer, got 7.5 \(Tesla T4\); use backend=\"torch\""):
            gpu.run(name, (first,))


def test_newer_architecture_is_accepted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=None))
    ops.check_gpu(torch.device("cuda", 0))
    with pytest.raises(ValueError, match="expected CUDA tensors, got mps"):
        ops.check_gpu(torch.device("mps"))


@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to find C compiler."), subprocess.CalledProcessError(1, ["gcc", "main.c"])]
)
def test_a_gpu_without_a_compiler_is_named(monkeypatch, error):
    class Driver:
        @property
        def active(self):
            raise error

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(triton.runtime, "driver", Driver())
    with pytest.raises(RuntimeError, match="expected a C compiler and Python's headers") as raised:
        ops.check_gpu(torch.device("cuda", 0))
    assert str(error) in str(raised.value) and 'attention="torch"' in str(raised.value)


def test_an_unknown_gpu_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary GPU 1")
    monkeypatch.setattr(launch, "file_of", launch.file_of.__wrapped__)  # nothing is remembered of an imaginary GPU
    with caplog.at_level("INFO", logger="specedit_kernels"):
        for _ in range(2):
            assert launch.config("norm_rope", torch.device("cuda", 0), None, head_dim=128)["block_rows"]
    assert [r.message for r in caplog.records] == [
        "no tuned launch parameters for Imaginary GPU 1; using default_sm_90.json"
    ]


def test_vector_width():
    x = torch.zeros(64, dtype=torch.float16)
    assert launch.vector_width(2, [x], [64, 3072]) == 8
    assert launch.vector_width(2, [x], [64, 12]) == 4
    assert launch.vector_width(2, [x[1:]], [64]) == 1


def test_what_fits_a_descriptor():
    x = torch.zeros(2, 8, 3, 64, dtype=torch.float16)
    assert attention_launch.fits_descriptor(x)
    assert attention_launch.fits_descriptor(x[:, ::2, 1:])
    assert not attention_launch.fits_descriptor(x[..., 1:])
    assert not attention_launch.fits_descriptor(x[:, :0])
    assert not attention_launch.fits_descriptor(x[..., ::2])
    assert not attention_launch.fits_descriptor(x[:1].expand(2, -1, -1, -1))


def test_attention_copies_only_unaligned_layouts():
    x = torch.zeros(2, 8, 3, 64, dtype=torch.float16)
    for good in (x, x[:, ::2, 1:], x[:1].expand(2, -1, -1, -1), x[0], x.transpose(1, 2), x[..., 16:32]):
        assert attention_launch.with_batch(good).data_ptr() == good.data_ptr()
    padded = torch.zeros(2, 8, 3, 65, dtype=torch.float16)
    far = torch.empty_strided((1, 2, 1, 16), (2**23, 2**22, 16, 1), dtype=torch.float16, device="meta")
    assert attention_launch.with_batch(far).is_contiguous()
    for bad in (x[..., 1:17], x[..., ::2], padded[..., :64], x.flatten()[1:-63].view(-1, 1, 64)):
        copied = attention_launch.with_batch(bad)
        assert attention_launch.fits_descriptor(copied) and torch.equal(copied, bad if bad.dim() == 4 else bad[None])


@runs_kernels
@pytest.mark.parametrize("kernel,entry", attention_entries())
def test_every_attention_configuration(device, rng, as_good, kernel, entry):
    """Ragged sequences with a bias through each shipped tile, by descriptors and by pointers."""
    dim = entry["shape"]["head_dim"]
    half = torch.bfloat16 if kernel == "attention_tma" else torch.float16
    dtype = half if entry["shape"]["bits"] == 16 else torch.float32
    if device.type == "cuda" and kernel == "attention_tma" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs TMA")
    q, k, v = (torch.randn(n, 1, dim, generator=rng).to(device, dtype) for n in (150, 300, 300))
    cu_q = torch.tensor([0, 10, 150], dtype=torch.int32, device=device)
    cu_k = torch.tensor([0, 200, 300], dtype=torch.int32, device=device)
    bias = torch.randn(300, generator=rng).to(device)
    bias[::5] = -math.inf
    arguments = (q, k, v, cu_q, cu_k, None, bias, dim**-0.5, True)
    out, lse = gpu.run("mixed_attention", arguments, {kernel: entry["config"]})
    cpu = [x.cpu() for x in (cu_q, cu_k, bias)]
    exact, exact_lse = mixed_attention(q.double().cpu(), k.double().cpu(), v.double().cpu(), cu_seqlens_q=cpu[0],
                                       cu_seqlens_k=cpu[1], key_bias=cpu[2], return_lse=True)  # fmt: skip
    as_good(lse.cpu(), exact_lse, exact_lse.float())
    error = (out.cpu().double() - exact).abs().max().item()
    assert error < 16 * torch.finfo(dtype).eps


@runs_kernels
@pytest.mark.parametrize("kernel", ["attention", "attention_tma"])
@pytest.mark.parametrize("keys, with_bias", [(7, False), (128, True), (150, True), (150, False)])
def test_a_tail_masked_in_the_main_loop(device, rng, as_good, kernel, keys, with_bias):
    """The tuner's candidate, dense and packed: NaN of the next sequence is never read."""
    if device.type == "cuda" and kernel == "attention_tma" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs TMA")
    half = torch.bfloat16 if keys == 150 else torch.float16
    q, k, v = (torch.randn(2, n, 2, 64, generator=rng).to(half) for n in (70, keys, keys))
    bias = torch.randn(2, keys, generator=rng) if with_bias else None
    if bias is not None:
        bias[1] = -math.inf
    exact = mixed_attention(q.double(), k.double(), v.double(), key_bias=bias, return_lse=True)
    same = mixed_attention(q, k, v, key_bias=bias, return_lse=True)
    on_device = [x.to(device) for x in (q, k, v)]
    on_bias = None if bias is None else bias.to(device)
    tuned = {kernel: {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2, "masked_tail": 1}}
    tuned.setdefault("attention", tuned[kernel])
    out, lse = gpu.run("mixed_attention", (*on_device, None, None, None, on_bias, 0.125, True), tuned)
    as_good(out.cpu(), exact[0], same[0])
    as_good(lse.cpu(), exact[1], same[1])
    ends = [torch.tensor([0, n, 2 * n], dtype=torch.int32, device=device) for n in (70, keys)]
    flat = [x.flatten(0, 1) for x in on_device]
    flat[1][keys:], flat[2][keys:] = math.nan, math.nan
    flat_bias = None if on_bias is None else on_bias.flatten()
    packed, _ = gpu.run("mixed_attention", (*flat, *ends, None, flat_bias, 0.125, False), tuned)
    as_good(packed[:70].cpu(), exact[0][0], same[0][0])


@runs_kernels
@pytest.mark.parametrize(
    "lengths, longest",
    [
        (([5, 300, 0, 64], [7, 7, 100, 50]), (None, 300)),
        (([1] * 129, list(range(129))), (1,)),  # more than the kernel looks at in one go
    ],
    ids=["few", "many"],
)
def test_plan_covers_every_block_once_longest_keys_first(device, lengths, longest):
    queries, keys = lengths
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(device, torch.int32) for n in lengths)
    table, *bounded = (
        attention_plan.Schedule(len(queries), sum(queries), sum(keys), most, 64)(cu_q, cu_k).tolist()
        for most in longest
    )
    real = [row for row in table if row[0] >= 0]
    blocks = [-(-n // 64) for n in queries]
    assert sorted(b for b, _ in real) == [b for b, n in enumerate(blocks) for _ in range(n)]
    assert table[: len(real)] == real, "nothing follows the end of the plan"
    for place, (b, first) in enumerate(real):
        assert first <= place < first + blocks[b]
    order = [keys[b] for b, _ in real]
    assert order == sorted(order, reverse=True)
    assert all(other[: len(real)] == real for other in bounded)


@runs_kernels
@pytest.mark.parametrize("ends", [[0, 40, 10, 60], [0, 10, 20, 900], [-50, 10, 20, 30], [60, 0, 60, 0]], ids=str)
def test_wrong_offsets_stay_within_the_tensor(device, ends):
    """With the value checks below the launch, wrong cu_seqlens are clamped: nothing is read or written outside."""
    padded = torch.full((180, 1, 16), math.nan, device=device)
    padded[60:120] = 0
    q = padded[60:120]
    bad = torch.tensor(ends, dtype=torch.int32, device=device)
    good = torch.tensor([0, 20, 40, 60], dtype=torch.int32, device=device)
    for cu_q, cu_k in ((bad, good), (good, bad)):
        out, _ = gpu.run("mixed_attention", (q, q, q, cu_q, cu_k, None, None, 0.25, False))
        assert out.shape == q.shape
    assert not gpu.run("mixed_attention", (q, q, q, good, bad, None, None, 0.25, False))[0].isnan().any()


@runs_kernels
def test_wrong_indices_stay_within_the_tensor(device):
    """With the value checks below the launch, rows out of range gather as zeros and are not scattered."""
    padded = torch.full((15, 8), math.nan, device=device)
    padded[5:10] = torch.arange(5.0, device=device)[:, None]
    x = padded[5:10]
    index = torch.tensor([4, 5, -1, 0, 2**31 - 1, -(2**31)], device=device)
    y = gpu.run("gather_tokens", (x, index))
    assert torch.equal(y[:, 0].cpu(), torch.tensor([4.0, 0, 0, 0, 0, 0]))
    gpu.run("scatter_tokens", (torch.full((6, 8), 9.0, device=device), index, x))
    assert torch.equal(x[:, 0].cpu(), torch.tensor([9.0, 1, 2, 3, 9]))
    assert padded[:5].isnan().all() and padded[10:].isnan().all()
    rows = torch.ones(6, 1, 8, device=device)
    out = padded[:, None]
    weight, angle = torch.ones(8, device=device), torch.zeros(6, 4, device=device)
    gpu.run("qk_norm_rope", (rows, rows, None, weight, weight, angle.cos(), angle.sin(), 0.0, index, out[5:10],
                             out[5:10], None))  # fmt: skip
    torch.testing.assert_close(x[:, 0].cpu(), torch.tensor([1.0, 1, 2, 3, 1]))
    assert padded[:5].isnan().all() and padded[10:].isnan().all()


@runs_kernels
@pytest.mark.parametrize("seed", range(8))
def test_random_ragged_batches(device, as_good, seed):
    g = torch.Generator().manual_seed(seed)
    scale_up = 8 if device.type == "cuda" else 1
    batch, heads = (int(torch.randint(1, n, (1,), generator=g)) for n in (7, 4))
    dim = 16 * int(torch.randint(1, 9, (1,), generator=g))
    lengths = torch.randint(0, 90 * scale_up, (2, batch), generator=g) * (torch.rand(2, batch, generator=g) > 0.2)
    cu = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).to(torch.int32)
    half = (torch.float16, torch.bfloat16)[seed % 2]
    q, k, v = (torch.randn(int(cu[i, -1]), heads, dim, generator=g).to(half) for i in (0, 1, 1))
    bias = torch.randn(k.shape[0], generator=g)
    bias[torch.rand(bias.shape, generator=g) < 0.2] = -math.inf
    arguments = {"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1], "key_bias": bias, "return_lse": True}
    exact = mixed_attention(*(x.double() for x in (q, k, v)), **arguments)
    same = mixed_attention(q, k, v, **arguments)
    on_device = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    got = mixed_attention(*(x.to(device) for x in (q, k, v)), **on_device, backend="triton")
    as_good(got[0].cpu(), exact[0], same[0])
    as_good(got[1].cpu(), exact[1], same[1])
