"""Where an edit has changed a picture, and where the picture has only passed through the autoencoder.

Verification finds whole cells, and around an edit most of their pixels are the picture's own, a little blurred by
encoding and decoding. Once that is hardly visible; edit after edit, it becomes a haze. The picture's own rendition, its
latents decoded without an edit, has the same blur: what the result has in common with it is not an edit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

FAINT = 6 / 255  # mean difference of the channels up to which nothing has changed; from twice as much on, all has
RADIUS = 4  # px over which differences are averaged


def changed(images: Sequence[Image.Image], rendition: Tensor, shown: Tensor | None = None) -> Tensor:
    """Weights (B, H, W) float32 on the CPU: 0 where a result is the rendition's, 1 where it is another picture.

    images: the decoded results. rendition: (B, 3, H, W) in 0..1, what the decoder makes of the input's latents.
    shown: (B, H, W) bool, the pixels that count; others may not have been decoded.
    """
    results = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2).float() / 255
    difference = (results - rendition.detach().float().cpu()).abs().mean(1, keepdim=True)
    if shown is not None:
        difference = difference * shown.cpu()[:, None]
    mean = F.avg_pool2d(F.pad(difference, (RADIUS,) * 4, mode="replicate"), 2 * RADIUS + 1, stride=1)
    return (mean / FAINT - 1).clamp(0, 1)[:, 0]
