"""What several tests in this folder use."""

from collections import Counter

import numpy as np
import torch

CORNER = np.zeros((128, 128), dtype=bool)
CORNER[:60, :60] = True
CENTRE = np.zeros((128, 128), dtype=bool)
CENTRE[40:90, 40:120] = True
QUICK = dict(steps=(2, 2, 2), draft_steps=2)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def count_calls(pipe):
    """A counter of transformer calls by target and reference tokens."""
    calls = Counter()

    def count(module, args, kwargs):
        calls[kwargs["hidden_states"].shape[1]] += 1

    pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    return calls


def unpacked(pipe, tokens):
    return pipe._unpack_latents(tokens, 128, 128, 8)
