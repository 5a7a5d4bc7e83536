"""Calls on a CPU that are like an earlier one: what depends on shapes alone is checked once, all else every time."""

import dataclasses

import pytest
import torch

from specedit_kernels import (
    BlockKeep,
    checks,
    expand_tokens,
    gather_tokens,
    mixed_attention,
    qk_norm_rope,
    ready,
    scatter_tokens,
    weighted_sum,
)  # fmt: skip


@pytest.fixture
def remembered(monkeypatch):
    """Nothing at first."""
    monkeypatch.setattr(ready, "_FOUND", {})
    return ready._FOUND


@pytest.fixture
def arguments():
    x, weight = torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(0)), torch.ones(8)
    angles = torch.linspace(0, 1, 24).view(6, 4)
    return x, x + 1, weight, weight + 1, angles.cos(), angles.sin()


def fail(*args, **kwargs):
    raise AssertionError("checked again")


def test_a_repeated_call_skips_its_checks_and_gives_the_same(remembered, arguments, monkeypatch):
    q, k = arguments[:2]
    bias = torch.zeros(1, 6)
    calls = (lambda: qk_norm_rope(*arguments), lambda: mixed_attention(q, k, k, key_bias=bias, return_lse=True))
    first = [call() for call in calls]
    monkeypatch.setattr(checks, "check_norm_rope", fail)
    monkeypatch.setattr(checks, "check_attention", fail)
    for one, call in zip(first, calls, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, call(), strict=True))
    assert len(remembered) == 2
    with pytest.raises(AssertionError, match="checked again"):
        mixed_attention(q[:, :5], k, k, key_bias=bias)
    with pytest.raises(AssertionError, match="checked again"):
        mixed_attention(q, k, k, key_bias=bias, backend="torch")


@pytest.mark.parametrize("return_lse", [False, True])
def test_a_repeated_call_gives_the_tensors_that_it_writes(remembered, arguments, return_lse):
    q, k = arguments[:2]
    rows, index, weights = q[0, :, 0], torch.tensor([4, 0]), torch.tensor([0.5, 2.0])
    pair = torch.empty_like(q), torch.empty(1, 2, 6)
    written = pair if return_lse else pair[0]
    calls = [
        (lambda out: gather_tokens(rows, index, out=out), rows.new_empty(2, 8)),
        (lambda out: scatter_tokens(rows[:2], index, out), torch.zeros(6, 8)),
        (lambda out: expand_tokens(rows, 0.5, noise=rows.new_zeros(6, 4, 2, 3), out=out)[0], rows.new_empty(6, 4, 8)),
        (lambda out: weighted_sum(torch.stack([q, k]), weights, out=out), torch.empty_like(q)),
        (lambda out: mixed_attention(q, k, k, return_lse=return_lse, out=out), written),
        (lambda out: qk_norm_rope(*arguments, out=out), (torch.empty_like(q), torch.empty_like(q))),
    ]
    for call, out in calls:
        want = [x.clone() for x in as_list(call(out))]
        for x in as_list(out):
            x.fill_(9.0)
        got = as_list(call(out))
        assert all(a is b for a, b in zip(got, as_list(out), strict=True))
        if call is not calls[1][0]:  # which writes some rows alone
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def as_list(tensors):
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def test_values_memory_and_malformed_arguments_are_checked_every_time(remembered, arguments):
    q, k = arguments[:2]
    index, out = torch.arange(6), [torch.empty_like(q) for _ in range(2)]
    qk_norm_rope(*arguments, out=out, out_index=index)
    with pytest.raises(ValueError, match=r"out_index: expected values in \[0, 6\)"):
        qk_norm_rope(*arguments, out=out, out_index=index + 1)
    with pytest.raises(ValueError, match=r"out\[1\]: expected no memory in common"):
        qk_norm_rope(*arguments, out=[out[0], out[0]], out_index=index)
    mixed_attention(q, k, k, return_lse=True)
    with pytest.raises(ValueError, match="out: expected a pair"):
        mixed_attention(q, k, k, return_lse=True, out=out[0])
    with pytest.raises(TypeError, match="block_keep: expected"):
        mixed_attention(q, k, k, return_lse=True, block_keep=object())
    keep = BlockKeep.from_mask(torch.ones(1, 1, dtype=torch.bool), query_block=64, key_block=64)
    mixed_attention(q, k, k, block_keep=keep)
    with pytest.raises(ValueError, match="block_keep: expected 1 key blocks"):
        mixed_attention(q, k, k, block_keep=dataclasses.replace(keep, key_blocks=5))


def test_a_repeated_call_keeps_its_derivatives(remembered, arguments):
    q, *others = arguments
    plain = qk_norm_rope(q, *others)[0]
    q = q.requires_grad_()
    got = qk_norm_rope(q, *others)[0]
    assert torch.equal(got, plain) and torch.autograd.grad(got.sum(), q)[0].abs().sum() > 0
