"""What the tests of several methods use."""

import torch

GUIDED = dict(negative_prompt="blue and dark", true_cfg_scale=2.5)


def mask_of(*cells, size=(128, 128)):
    """A mask whose cells of 32 px (row, column) are edited."""
    mask = torch.zeros(size)
    for row, column in cells:
        mask[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = 1
    return mask
