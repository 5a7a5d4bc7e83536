"""gather_tokens and scatter_tokens against plain indexing."""

import pytest
import torch

from specedit_kernels import gather_tokens, scatter_tokens

CASES = [  # batch, tokens, rows, channels
    (1, 7, 3, 64),
    (2, 33, 20, 24),
    (3, 5, 5, 1),
    (2, 17, 9, 3),
    (1, 70, 65, 520),
    (2, 6, 0, 16),
    (0, 6, 3, 16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_gather_batched(backend, dtype, device, rng, case, index_dtype):
    batch, tokens, rows, channels = case
    x = torch.randn(batch, tokens, channels, generator=rng).to(device, dtype)
    index = torch.randint(tokens, (batch, rows), generator=rng).to(device, index_dtype)
    y = gather_tokens(x, index, backend=backend)
    want = x[torch.arange(batch, device=device)[:, None], index.long()]
    assert y.is_contiguous() and torch.equal(y, want)


def test_gather_shared_index_and_shared_tokens(backend, device, rng):
    x = torch.randn(2, 9, 32, generator=rng).to(device)
    index = torch.tensor([8, 0, 3, 3], device=device)
    assert torch.equal(gather_tokens(x, index, backend=backend), x[:, index])
    assert torch.equal(gather_tokens(x[0], index, backend=backend), x[0, index])
    assert torch.equal(gather_tokens(x[0], index.view(2, 2), backend=backend), x[0, index.view(2, 2)])


@pytest.mark.parametrize("dtype_", [torch.int32, torch.int64], ids=str)
def test_gather_integers(backend, device, dtype_):
    x = torch.arange(60, device=device, dtype=dtype_).view(10, 6) * 2**20
    index = torch.tensor([9, 1], device=device)
    assert torch.equal(gather_tokens(x, index, backend=backend), x[index])


def test_strided_views(backend, device, rng):
    base = torch.randn(2, 16, 3, 40, generator=rng).to(device)
    x = base[:, ::2, 1, 3:35]  # row stride 240, storage offset not a multiple of 16 bytes
    index = torch.tensor([[7, 2, 0], [1, 1, 6]], device=device)[:, ::2]
    want = torch.stack([x[0, index[0]], x[1, index[1]]])
    assert torch.equal(gather_tokens(x, index, backend=backend), want)
    channels_last = x.transpose(1, 2).contiguous().transpose(1, 2)  # channel stride 8
    assert torch.equal(gather_tokens(channels_last, index, backend=backend), want)
    target = base.clone()
    out = target[:, ::2, 1, 3:35]
    scatter_tokens(want * 2, index, out, backend=backend)
    expected = base.clone()
    for b in range(2):
        expected[b, ::2, 1, 3:35][index[b]] = want[b] * 2
    assert torch.equal(target, expected)


@pytest.mark.parametrize("case", [c for c in CASES if c[2] <= c[1]], ids=str)
def test_scatter_batched(backend, dtype, device, rng, case):
    batch, tokens, rows, channels = case
    out = torch.full((batch, tokens, channels), float("nan"), dtype=dtype, device=device)
    src = torch.randn(batch, rows, channels, generator=rng).to(device, dtype)
    order = [torch.randperm(tokens, generator=rng)[:rows] for _ in range(batch)]
    index = torch.stack(order).to(device) if batch else torch.empty(0, rows, dtype=torch.int64, device=device)
    want = out.clone()
    for b in range(batch):
        want[b, index[b]] = src[b]
    result = scatter_tokens(src, index, out, backend=backend)
    assert result is out
    assert torch.equal(out.nan_to_num(7.0), want.nan_to_num(7.0))


def test_scatter_shared_index(backend, device, rng):
    src = torch.randn(2, 3, 16, generator=rng).to(device)
    index = torch.tensor([4, 0, 2], device=device, dtype=torch.int32)
    out = torch.zeros(2, 5, 16, device=device)
    scatter_tokens(src, index, out, backend=backend)
    assert torch.equal(out[:, index.long()], src) and not out[:, [1, 3]].any()
    flat = torch.zeros(5, 16, device=device)
    scatter_tokens(src[0], index, flat, backend=backend)
    assert torch.equal(flat, out[0])


def test_scatter_inverts_gather(backend, device, rng):
    x = torch.randn(2, 50, 48, generator=rng).to(device)
    index = torch.stack([torch.randperm(50, generator=rng) for _ in range(2)]).to(device)
    back = torch.full_like(x, float("nan"))
    scatter_tokens(gather_tokens(x, index, backend=backend), index, back, backend=backend)
    assert torch.equal(back, x)


def test_bad_input(backend, device):
    x = torch.zeros(2, 5, 4, device=device)
    index = torch.zeros(3, dtype=torch.int64, device=device)
    for call, error, text in [
        (lambda: gather_tokens(x.tolist(), index), TypeError, "x: expected a torch.Tensor, got list"),
        (lambda: gather_tokens(x, index.float()), TypeError, "expected dtype int32, int64, got float32"),
        (lambda: gather_tokens(x[0, 0], index), ValueError, r"expected 2 or 3 dimensions, got shape \(4,\)"),
        (lambda: gather_tokens(x, index.expand(3, 3)), ValueError, "expected batch 2"),
        (lambda: gather_tokens(x, index.to("meta")), ValueError, "expected device .*, got meta"),
        (lambda: gather_tokens(x, index, backend="cuda"), ValueError, "expected one of .* got 'cuda'"),
        (lambda: scatter_tokens(x[:, :3].half(), index, x), TypeError, "expected dtype float32, got float16"),
        (lambda: scatter_tokens(x[:, :2], index, x), ValueError, r"expected shape \(2, 3, 4\), got \(2, 2, 4\)"),
        (lambda: scatter_tokens(x[0, :3], index.expand(2, 3), x[0]), ValueError, "expected 1 dimensions"),
    ]:
        with pytest.raises(error, match=text):
            call()


@pytest.mark.parametrize("bad", [5, -1, 2**31 - 1, -(2**31)])
def test_index_out_of_range(backend, device, monkeypatch, bad):
    x = torch.ones(5, 4, device=device)
    index = torch.tensor([0, bad], device=device)
    monkeypatch.setenv("SPECEDIT_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"index: expected values in \[0, 5\), got values from"):
        gather_tokens(x, index, backend=backend)
    with pytest.raises(ValueError, match=r"index: expected values in \[0, 5\), got values from"):
        scatter_tokens(x[:2], index, x, backend=backend)


def test_repeated_rows_raise_in_debug_mode(backend, device, monkeypatch):
    monkeypatch.setenv("SPECEDIT_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="expected unique values"):
        scatter_tokens(torch.ones(2, 4, device=device), torch.tensor([1, 1], device=device),
                       torch.ones(5, 4, device=device), backend=backend)  # fmt: skip
