"""Training on a CPU: attention as matrix products, kept memory, the faster precision."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.micro import cpu, train


def inputs(n=37, m=53, dtype=torch.float32):
    """q (2, 3, n, 64), k and v (2, 3, m, 64), not contiguous, as diffusers passes them."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, 3, 64, generator=generator).to(dtype).transpose(1, 2) for length in (n, m, m)]


def gradients(f, tensors):
    leaves = [t.detach().clone().requires_grad_(True) for t in tensors]
    out = f(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, m", [(37, 53), (1, 1), (1, 130), (256, 256)])
def test_attention_and_gradients_match_pytorch(n, m, dtype):
    tensors = inputs(n, m, dtype)
    exact = gradients(F.scaled_dot_product_attention, [t.double() for t in tensors])
    # PyTorch's own products where they are of the same precision: how its fused function adds up differs from CPU to
    # CPU, but under bfloat16 the products are in float32.
    with sdpa_kernel(SDPBackend.MATH if dtype is torch.float32 else SDPBackend.FLASH_ATTENTION):
        theirs = gradients(F.scaled_dot_product_attention, tensors)
    ours = gradients(cpu.attention, tensors)
    for got, peer, wanted in zip(ours, theirs, exact, strict=True):
        assert got.dtype == dtype and got.shape == wanted.shape
        error, allowed = ((t.double() - wanted).norm() for t in (got, peer))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * 1e-3 * wanted.norm()


def test_plain_calls_are_replaced():
    q, k, v = inputs()
    wanted = cpu.attention(q, k, v)
    assert not torch.equal(F.scaled_dot_product_attention(q, k, v), wanted)  # or the test would prove nothing
    with cpu.PlainAttention():
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), wanted)
        named = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=False)
        assert torch.equal(named, wanted)
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, None, 0.0), wanted)
    assert not torch.equal(F.scaled_dot_product_attention(q, k, v), wanted)


@pytest.mark.parametrize(
    "special",
    [
        dict(is_causal=True),
        dict(attn_mask=torch.rand(37, 53, generator=torch.Generator().manual_seed(1)) < 0.5),
        dict(attn_mask=torch.zeros(37, 53)),
        dict(scale=0.5),
        dict(dropout_p=0.5),
    ],
)
def test_other_calls_are_passed_on(special):
    def call():
        torch.manual_seed(0)
        return F.scaled_dot_product_attention(*inputs(), **special)

    wanted = call()
    with cpu.PlainAttention():
        assert torch.equal(call(), wanted)


def test_attention_on_a_gpu_is_unchanged():
    q, k, v = inputs()
    wanted = F.scaled_dot_product_attention(q, k, v)
    with cpu.fast("cuda"):
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), wanted)


ROOT = Path(__file__).parents[3]
FREED = """
import torch
from training.micro import cpu

def resident():  # MiB, after 64 of them were taken and dropped at once
    torch.ones(1 << 24)
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) >> 10

plain = resident()
with cpu.fast("cpu"):
    pass
print(plain, resident())
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_process_keeps_freed_memory():
    run = subprocess.run([sys.executable, "-c", FREED], capture_output=True, check=True, cwd=ROOT)
    plain, kept = map(int, run.stdout.split())
    assert kept - plain > 50  # MiB


def test_command_trains_with_plain_attention(tmp_path, monkeypatch):
    q, k, v = inputs()
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda _: None)  # keep this process's allocator
    seen = []
    monkeypatch.setattr(train, "train", lambda settings: seen.append(F.scaled_dot_product_attention(q, k, v)))
    train.main(["--out", str(tmp_path), "--device", "cpu"])
    assert torch.equal(seen[0], cpu.attention(q, k, v))


@pytest.mark.parametrize("slower, chosen", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_autocast_uses_the_faster_precision(monkeypatch, slower, chosen):
    now, linear = [0.0], F.linear

    def timed(x, weight):
        now[0] += 2.0 if x.dtype is slower else 1.0
        return linear(x, weight)

    with monkeypatch.context() as patched:
        patched.setattr(F, "linear", timed)
        faster = cpu.bfloat16_is_faster.__wrapped__(lambda: now[0])
    assert faster == (chosen is torch.bfloat16)
    monkeypatch.setattr(cpu, "bfloat16_is_faster", lambda: faster)
    with cpu.autocast("cpu"):
        assert torch.ones(2, 3).matmul(torch.ones(3, 2)).dtype is chosen


def test_autocast_on_a_gpu_is_bfloat16(monkeypatch):
    def ask():
        raise AssertionError("the CPU was asked")

    monkeypatch.setattr(cpu, "bfloat16_is_faster", ask)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: (kind, dtype, enabled))
    assert cpu.autocast("cuda:1") == ("cuda", torch.bfloat16, True)
