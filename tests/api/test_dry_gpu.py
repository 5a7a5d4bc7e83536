"""What a whole edit launches and compiles, on a GPU that is not there: Triton's launcher, plain PyTorch's numbers."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch

import specedit
from benchmarks import dry_gpu

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
