"""What several tests in this folder use."""

import numpy as np

CORNER = np.zeros((128, 128), dtype=bool)
CORNER[:60, :60] = True
QUICK = dict(steps=(1, 1, 1), draft_steps=1)


def processors(pipe):
    return list(pipe.transformer.attn_processors.values())


def same_objects(first, second):
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
