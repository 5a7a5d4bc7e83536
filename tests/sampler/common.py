"""What several tests in this folder use."""

from collections import Counter

import numpy as np
import torch

import specedit

CORNER = np.zeros((128, 128), dtype=bool)
CORNER[:60, :60] = True
CENTRE = np.zeros((128, 128), dtype=bool)
CENTRE[40:90, 40:120] = True
QUICK = dict(steps=(2, 2, 2), draft_steps=2)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def assert_two_single_runs(pipe, edit, picture, masks):
    """An installed pipeline edits two pictures with a mask each as it edits them one by one."""
    pictures, prompts = [picture(seed=1), picture(seed=2)], ["make it red", "add a boat"]
    both = edit(pipe, image=pictures, prompt=prompts, edit_mask=masks, generator=generators(3, 4))
    assert specedit.report(pipe).edit_mask.shape == (2, 4, 4)
    for i, mask in enumerate(masks):
        one = edit(pipe, image=pictures[i], prompt=prompts[i], edit_mask=mask, generator=generators(3, 4)[i])
        close(both[i], one[0])


def count_calls(pipe):
    """A counter of transformer calls by target and reference tokens."""
    calls = Counter()

    def count(module, args, kwargs):
        calls[kwargs["hidden_states"].shape[1]] += 1

    pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    return calls


def unpacked(pipe, tokens):
    return pipe._unpack_latents(tokens, 128, 128, 8)
