"""Tensors that kernels write into: their elements have memory of their own."""

import pytest
import torch

from specedit_kernels import overlap, qk_norm_rope, scatter_tokens


def elements(tensor):
    """The addresses of all bytes, one by one."""
    offsets = torch.zeros(tensor.shape, dtype=torch.int64)
    for axis, (stride, n) in enumerate(zip(tensor.stride(), tensor.shape)):
        offsets += (torch.arange(n) * stride).view([-1 if i == axis else 1 for i in range(tensor.dim())])
    size = tensor.element_size()
    return [tensor.data_ptr() + int(o) * size + byte for o in offsets.flatten() for byte in range(size)]


@pytest.mark.parametrize("seed", range(20))
def test_overlap_is_exact(seed):
    g = torch.Generator().manual_seed(seed)
    base = torch.zeros(400, dtype=torch.float16)

    def view():
        dims = int(torch.randint(1, 4, (1,), generator=g))
        shape, strides = (torch.randint(low, 6, (dims,), generator=g).tolist() for low in (1, 0))
        return base.as_strided(shape, strides, int(torch.randint(0, 60, (1,), generator=g)))

    for _ in range(20):
        a, b = view(), view()
        own, other = elements(a), elements(b)
        assert overlap.overlaps_itself(a) == (len(set(own)) < len(own)), (a.shape, a.stride())
        assert overlap.share_memory(a, b) == bool(set(own) & set(other))


def test_adjacent_views_do_not_overlap():
    base = torch.zeros(2, 512, 3, 8, 32)
    parts = base.unbind(2)
    assert not overlap.share_memory(parts[0], parts[1]) and overlap.share_memory(parts[1], base)
    assert not overlap.share_memory(base[..., :16], base[..., 16:])
    assert not overlap.share_memory(base.to("meta"), base.to("meta")) and not overlap.share_memory(base[:0], base)
    assert overlap.overlaps_itself(torch.zeros(3, 1).expand(3, 4)) and not overlap.overlaps_itself(base.transpose(1, 3))
    assert overlap.overlaps_itself(torch.zeros(9).unfold(0, 3, 1)) and not overlap.overlaps_itself(torch.zeros(()))


def test_scatter_rejects_overlap(backend, device):
    base, index = torch.zeros(2, 6, 8, device=device), torch.tensor([0, 3], device=device)
    src = torch.ones(2, 2, 8, device=device)
    before = base.clone()
    for call, text in [
        (
            lambda: scatter_tokens(src, index, base[:1].expand(2, -1, -1), backend=backend),
            r"out: .* strides \(0, 8, 1\)",
        ),
        (lambda: scatter_tokens(src[0], index, base[0, :1].expand(6, -1), backend=backend), "out: .* overlaps itself"),
        (
            lambda: scatter_tokens(src[0, :, :3], index, base.flatten()[:8].unfold(0, 3, 1), backend=backend),
            "out: .* overlaps itself",
        ),
        (lambda: scatter_tokens(base[:, 2:4], index, base, backend=backend), "out: .* common with src, got"),
        (lambda: scatter_tokens(base[0, :2], index, base[0], backend=backend), "out: .* common with src, got"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()
    rows = torch.arange(12, device=device).view(6, 2)
    with pytest.raises(ValueError, match="out: expected no memory in common with index"):
        scatter_tokens(torch.zeros(2, 2, dtype=torch.int64, device=device), rows[:2, 0], rows, backend=backend)
    assert torch.equal(base, before)
    left, right = base[..., :4], base[..., 4:]
    scatter_tokens(right[:, :2], index, left, backend=backend)  # neighbours in one tensor are fine


def test_norm_rope_rejects_overlap(backend, device):
    q, k, v = torch.randn(3, 5, 2, 8, device=device)
    weight, angles, index = (
        torch.ones(8, device=device),
        torch.ones(5, 4, device=device),
        torch.arange(5, device=device),
    )
    one, two = torch.zeros(2, 5, 2, 8, device=device)
    wide = torch.zeros(5, 2, 12, device=device)

    def call(out, **arguments):
        return qk_norm_rope(q, k, weight, weight, angles, angles, out=out, backend=backend, **arguments)

    before = [x.clone() for x in (q, k, v)]
    for out, arguments, text in [
        ((one, one), {}, r"out\[1\]: .* common with out\[0\]"),
        ((k, q), {}, r"out\[0\]: .* common with k"),
        ((q, two), {"out_index": index}, r"out\[0\]: .* common with q"),
        ((one, two, k), {"v": v}, r"out\[2\]: .* common with k"),
        ((one[:1].expand(5, -1, -1), two), {}, r"out\[0\]: .* overlaps itself"),
        ((wide[..., :8], wide[..., 4:]), {}, r"out\[1\]: .* common with out\[0\]"),
    ]:
        with pytest.raises(ValueError, match=text):
            call(out, **arguments)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before))
    want = qk_norm_rope(q, k, weight, weight, angles, angles, v=v, backend=backend)
    got = call((q, k, v), v=v)  # in place
    assert all(torch.equal(x, y) for x, y in zip(got, want))
