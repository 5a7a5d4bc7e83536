"""What a whole edit launches and compiles, on a GPU that is not there: Triton's launcher, plain PyTorch's numbers."""

import copy
import warnings
from collections import Counter

import numpy as np
import pytest
import torch

import specedit
from benchmarks import dry_gpu
from specedit_kernels import KeyGroups, verdict

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(dry_gpu.missing()), reason=str(dry_gpu.missing()))]
SIZES = [(128, 128), (160, 128), (128, 192), (256, 128), (192, 192), (144, 224)]
PROMPTS = ["make it red", "make it as blue as the sea", "turn it green", "paint it", "remove the sign", "snow"]


def corner(height, width):
    mask = np.zeros((height, width), dtype=bool)
    mask[:60, :60] = True
    return mask


@pytest.fixture
def installed(pipe):
    pipe = copy.deepcopy(pipe).to(torch.bfloat16)  # its modules are everybody's
    specedit.install(pipe, steps=(1, 2, 1), draft_steps=1, attention="triton")
    return pipe


def test_edits_of_six_sizes_share_their_kernels(installed, edit, hooked, capsys):
    """Six edits compile at most eight variants, all in the first two; a transformer step launches a few per block."""
    compiled, steps = [], Counter()
    with dry_gpu.use((9, 0), computes=True, generates=False) as gpu:
        launched = gpu.launches

        def count(*_):
            nonlocal launched
            steps[gpu.launches - launched] += 1
            launched = gpu.launches

        hooked(installed.transformer, count)
        for size, prompt in zip(SIZES, PROMPTS, strict=True):
            gpu.compiled.clear()
            out = edit(installed, size, prompt=prompt, edit_mask=corner(*size))
            assert out.isfinite().all()
            compiled.append(list(gpu.compiled))
        assert gpu.errors == []
        assert "attend" in gpu.kernels and "norm_rope" in gpu.kernels
    everything = [name for one in compiled for name in one]
    assert 0 < len(everything) <= 8, compiled
    assert not any(compiled[1:]), compiled
    blocks = len(installed.transformer.transformer_blocks) + len(installed.transformer.single_transformer_blocks)
    with capsys.disabled():
        print(f"\nlaunches per transformer step of {blocks} blocks: {dict(sorted(steps.items()))}")
    # Norm and placement of two streams, and attention; between stages gathers, an expansion and their like.
    assert max(steps) <= 4 * blocks + 4


@torch.no_grad()
def test_an_edit_is_right_where_a_kernel_is_not(pipe, edit, tmp_path, monkeypatch):
    """attention="auto" on a GPU whose attention kernel is wrong: merged passes, whose bias is read once a stage."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = dict(steps=(1, 2, 1), draft_steps=1)
    specedit.install(pipe, **settings, attention="torch")
    want = edit(pipe, edit_mask=corner(128, 128))
    specedit.uninstall(pipe)
    specedit.install(pipe, **settings)
    read = []
    of = KeyGroups.of
    monkeypatch.setattr(KeyGroups, "of", lambda *args: read.append(args) or of(*args))
    with dry_gpu.use((9, 0), generates=False, checks=True, faulty=["mixed_attention"]) as gpu:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            verdict.verdict(torch.device("cpu"))
            gpu.clear()
            read.clear()
            got = edit(pipe, edit_mask=corner(128, 128))
        assert "norm_rope" in gpu.kernels and "attend" not in gpu.kernels
    assert [str(w.message)[:60] for w in said if "specedit_kernels" in str(w.message)] == [
        "specedit_kernels: failed their check: mixed_attention (bfloa"
    ]
    assert len(read) == 1  # of the mixed stage
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
