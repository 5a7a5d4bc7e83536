"""The operators: schemas that tell the truth, torch.compile without graph breaks, import without Triton."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import specedit_kernels as kernels

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="operators run compiled kernels")


def samples(device):
    """Arguments of every operator."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g).to(device)

    index = torch.tensor([3, 0, 2], device=device)
    cu = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    q = randn(8, 2, 16)
    angles = randn(8, 8)
    weight = randn(16)
    yield "gather_tokens", (randn(2, 5, 8), index)
    yield "gather_tokens", (randn(5, 8), index.expand(2, 3))
    yield "scatter_tokens", (randn(2, 3, 8), index, randn(2, 5, 8))
    yield "expand_tokens", (randn(2, 3, 8), 0.5, randn(2, 3, 4, 2, 3), None, None)
    yield "expand_tokens", (randn(3, 8), 0.5, None, torch.tensor([5], device=device), randn(3, 4, 2, 3))
    yield "expand_tokens", (randn(2, 3, 8), 0.5, randn(2, 3, 8, 3), None, None, 1)
    yield "expand_tokens", (randn(3, 8), 0.5, None, torch.tensor([5], device=device), randn(3, 8, 3), 1)
    yield "contract_tokens", (randn(2, 3, 4, 8), 0.5)
    yield "contract_tokens", (randn(2, 3, 4, 6), 0.5, 1)
    yield "mixed_attention", (q, q, q, cu, cu, 5, randn(8), 0.25, True)
    yield "mixed_attention", (q[None], q[None], q[None], None, None, None, None, 0.25, False)
    yield "mixed_attention", (q, q[:, :1], q[:, :1], cu, cu, None, randn(8), 0.25, True)
    yield "qk_norm_rope", (q, q, q, weight, weight, angles, angles, 1e-6, torch.arange(8, device=device),
                           randn(9, 2, 16), randn(9, 2, 16), randn(9, 2, 16))  # fmt: skip
    yield "qk_norm_rope", (q, q, None, weight, weight, angles, angles, 1e-6, None, randn(8, 2, 16), randn(8, 2, 16),
                           None)  # fmt: skip
    yield "weighted_sum", (randn(3, 2, 5, 8), randn(3))
    yield "weighted_sum", (randn(3, 8, 5).transpose(1, 2), randn(3))


@pytest.mark.parametrize("at", range(16))
def test_opcheck(device, at):
    name, arguments = list(samples(device))[at]
    torch.library.opcheck(getattr(torch.ops.specedit_kernels, name).default, arguments)


@pytest.mark.slow
def test_fullgraph_compile_with_dynamic_lengths(device):
    counter = CompileCounter()

    def edit(x, index, q, cu, bias, weight, cos, sin):
        picked = kernels.gather_tokens(x, index)
        fine, fine_sigma = kernels.expand_tokens(picked, 0.5, noise=torch.zeros(*picked.shape[:-1], 4, 2, 3,
                                                                               device=x.device))  # fmt: skip
        coarse, _ = kernels.contract_tokens(fine, fine_sigma)
        fine, fine_sigma = kernels.expand_tokens(
            coarse, 0.5, noise=torch.zeros(*coarse.shape, 3, device=x.device), patch=1
        )
        coarse, _ = kernels.contract_tokens(fine, fine_sigma, patch=1)
        out = kernels.scatter_tokens(coarse, index, x.clone())
        q, k = kernels.qk_norm_rope(q, q, weight, weight, cos, sin)
        attended, lse = kernels.mixed_attention(q, k, k, cu_seqlens_q=cu, cu_seqlens_k=cu, key_bias=bias,
                                                return_lse=True)  # fmt: skip
        return out, attended, lse

    torch._dynamo.reset()
    compiled = torch.compile(edit, fullgraph=True, dynamic=True, backend=counter)
    for tokens, length in ((10, 21), (14, 30), (31, 40)):  # sizes that never coincide, as dynamic shapes want
        arguments = [
            torch.randn(2, tokens, 8), torch.randperm(tokens)[: tokens // 2], torch.randn(length, 2, 16),
            torch.tensor([0, 4, length], dtype=torch.int32), torch.randn(length), torch.rand(16),
            torch.randn(length, 8), torch.randn(length, 8),
        ]  # fmt: skip
        arguments = [x.to(device) for x in arguments]
        for got, want in zip(compiled(*arguments), edit(*arguments)):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1, "other lengths must not compile again"


@pytest.mark.slow
def test_other_numbers_do_not_recompile(device):
    """Noise levels and scales change from step to step."""
    counter = CompileCounter()

    def edit(x, q, sigma, scale):
        coarse, coarse_sigma = kernels.contract_tokens(x, sigma)
        fine, _ = kernels.expand_tokens(
            coarse, coarse_sigma, noise=torch.ones(*coarse.shape[:-1], 4, 2, 3, device=x.device)
        )
        return fine, kernels.mixed_attention(q, q, q, scale=scale)

    torch._dynamo.reset()
    compiled = torch.compile(edit, fullgraph=True, backend=counter)
    x, q = torch.randn(2, 3, 4, 8, device=device), torch.randn(1, 7, 2, 16, device=device)
    for i in range(12):
        numbers = (0.1 + i / 20, 0.2 + i / 10)
        for got, want in zip(compiled(x, q, *numbers), edit(x, q, *numbers)):
            torch.testing.assert_close(got, want)
    assert counter.frame_count <= 2, "once with the first numbers, once with any"


@pytest.mark.slow
def test_plain_pytorch_by_choice_compiles_whole_on_the_cpu():
    torch._dynamo.reset()
    x, index, cu = torch.randn(5, 4), torch.tensor([3, 0]), torch.tensor([0, 3, 8], dtype=torch.int32)
    q = torch.randn(8, 2, 16)

    def edit(x, index, q, cu):
        attended = kernels.mixed_attention(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu, backend="torch")
        return kernels.gather_tokens(x, index, backend="torch"), attended

    compiled = torch.compile(edit, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, index, q, cu), edit(x, index, q, cu)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("key", ["CPU", "MPS", "XPU"])
def test_devices_without_kernels_run_plain_pytorch(key):
    for name in ("gather_tokens", "mixed_attention", "weighted_sum"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"specedit_kernels::{name}", key)


def test_values_are_checked_in_compiled_calls(device, monkeypatch):
    monkeypatch.setenv("SPECEDIT_KERNELS_DEBUG", "1")
    torch._dynamo.reset()
    compiled = torch.compile(kernels.gather_tokens, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="index: expected values"):
        compiled(torch.zeros(3, 4, device=device), torch.tensor([7], device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_replays_with_other_lengths(rng):
    q = torch.randn(100, 2, 64, generator=rng).to("cuda", torch.float16)
    bias = torch.randn(100, generator=rng).to("cuda")
    cu = torch.tensor([0, 30, 60, 100], dtype=torch.int32, device="cuda")

    def attend():
        return kernels.mixed_attention(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu, key_bias=bias)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for ends in ([0, 30, 60, 100], [0, 0, 99, 100], [0, 50, 50, 100]):
        cu.copy_(torch.tensor(ends, dtype=torch.int32))
        graph.replay()
        torch.testing.assert_close(out, attend())


FRESH = """
import json, sys, types
import torch, specedit_kernels as kernels

found = {}
kernels.gather_tokens(torch.zeros(3, 2), torch.tensor([1]))
found["imported"] = "specedit_kernels.gpu" in sys.modules

from specedit_kernels import ops

def error_of(call):
    try:
        call()
    except (ValueError, ImportError) as error:
        return f"{type(error).__name__} {error}"

sys.modules["triton"] = types.ModuleType("triton")
sys.modules["triton"].__version__ = "3.2.0"
found["older"] = error_of(lambda: ops.check_gpu(torch.device("cuda")))

sys.modules["triton"] = None  # importing it raises ImportError
assert kernels.available_backends() == ("merged", "torch")
x, index = torch.randn(5, 8), torch.tensor([3, 0])
q, w, angles = torch.randn(5, 2, 16), torch.ones(16), torch.zeros(5, 8)
cu = torch.tensor([0, 2, 5], dtype=torch.int32)
assert torch.equal(kernels.scatter_tokens(kernels.gather_tokens(x, index), index, x.clone()), x)
fine, sigma = kernels.expand_tokens(x, 0.5)
torch.testing.assert_close(kernels.contract_tokens(fine, sigma)[0], x)
assert kernels.mixed_attention(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu).shape == q.shape
assert kernels.mixed_attention(q[None], q[None], q[None], key_bias=torch.zeros(1, 5)).shape == (1, 5, 2, 16)
assert kernels.qk_norm_rope(q, q, w, w, angles.cos(), angles.sin())[0].shape == q.shape
assert torch.equal(kernels.weighted_sum(x[None], torch.ones(1)), x)
found["none"] = [error_of(lambda: kernels.gather_tokens(x, index, backend="triton")),
                 error_of(lambda: ops.run("triton", "gather_tokens", (x, index)))]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def fresh():
    """What a process of its own finds before it imports Triton, with an older Triton, and without any."""
    result = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
def test_works_without_triton(fresh):
    """Import and every function on the CPU; asking for Triton, and a CUDA tensor's call, say what is missing."""
    assert fresh["none"] == [
        'ValueError backend: expected CUDA tensors for "triton", got cpu',
        'ImportError expected Triton 3.6 or newer to run kernels, found none; use backend="torch", in specedit.install '
        'attention="torch"',
    ]


@pytest.mark.slow
def test_an_older_triton_is_named(fresh):
    message = 'ImportError expected Triton 3.6 or newer to run kernels, found 3.2.0; use backend="torch", in '
    message += 'specedit.install attention="torch"'
    assert fresh["older"] == message


@pytest.mark.slow
def test_triton_is_imported_lazily(fresh):
    assert fresh["imported"] is False
