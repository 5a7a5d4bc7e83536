"""Canny's edge detector (1986) in torch, batched, for the "edges" selector; OpenCV's L1 gradient and thresholds."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def canny(image: Tensor, low: float = 100.0, high: float = 200.0) -> Tensor:
    """Edges of images (B, 3, H, W) in 0..1, as (B, H, W) bool; alpha, a fourth channel, has no effect.

    Thresholds are on an 0..255 scale.
    """
    luma = torch.tensor([0.299, 0.587, 0.114], device=image.device, dtype=image.dtype).view(1, 3, 1, 1)
    grey = (image[:, :3] * luma).sum(1, keepdim=True) * 255
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=image.device, dtype=image.dtype)
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    dx, dy = F.conv2d(padded, kernel[None, None]), F.conv2d(padded, kernel.T[None, None])
    magnitude = dx.abs() + dy.abs()
    # Keep only ridges: larger than both neighbours along the gradient, rounded to one of four directions.
    sector = torch.remainder((torch.atan2(dy, dx) / (math.pi / 4)).round(), 4)
    around = F.pad(magnitude, (1, 1, 1, 1))
    h, w = grey.shape[-2:]
    ridge = torch.zeros_like(magnitude, dtype=torch.bool)
    for direction, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = around[..., 1 + y : 1 + y + h, 1 + x : 1 + x + w]
        behind = around[..., 1 - y : 1 - y + h, 1 - x : 1 - x + w]
        ridge |= (sector == direction) & (magnitude > ahead) & (magnitude >= behind)
    weak, strong = ridge & (magnitude > low), ridge & (magnitude > high)
    # Hysteresis: weak edges survive where they touch strong ones, however far along.
    while True:
        grown = (F.max_pool2d(strong.float(), 3, 1, 1) > 0) & weak | strong
        if bool((grown == strong).all()):
            return strong[:, 0]
        strong = grown
