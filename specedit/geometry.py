"""What a token holds: a packed patch of 2 x 2 latent pixels, or a single pixel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenGeometry:
    """Tokens of `patch` x `patch` latent pixels, channel slowest: C = channels * patch * patch.

    A coarse token has as many pixels as a fine one, each for a 2 x 2 *block* of fine pixels. A cell's four fine tokens
    are its *children*. Packed, every child is a block, and pixel (a, b) of the coarse token stands for child (a, b).
    Unpacked, the four children are one block.

    Raises:
        ValueError: `patch` is neither 1 nor 2.
    """

    patch: int

    def __post_init__(self) -> None:
        if self.patch not in (1, 2):
            raise ValueError(f"patch: expected 1 (unpacked) or 2 (packed 2 x 2), got {self.patch}")

    @property
    def pixels(self) -> int:
        """Latent pixels of a token."""
        return self.patch**2

    def to_pixels(self, tokens: Tensor) -> Tensor:
        """Tokens (..., C) as (..., pixels, channels)."""
        return tokens.unflatten(-1, (-1, self.pixels)).transpose(-1, -2)

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """The inverse of `to_pixels`."""
        return pixels.transpose(-1, -2).flatten(-2)

    def to_blocks(self, children: Tensor) -> Tensor:
        """Children (..., 4, C) as (..., pixels, channels, 4): the block that each pixel of the coarse token covers."""
        if self.patch == 2:
            return children.unflatten(-1, (-1, 4))
        return children.transpose(-1, -2).unsqueeze(-3)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """The inverse of `to_blocks`."""
        if self.patch == 2:
            return blocks.flatten(-2)
        return blocks.squeeze(-3).transpose(-1, -2)

    def to_image(self, tokens: Tensor, shape: tuple[int, int]) -> Tensor:
        """Tokens (B, h * w, C) of a grid of `shape` (h, w) as a latent image (B, channels, patch * h, patch * w)."""
        (h, w), p = shape, self.patch
        grid = tokens.unflatten(-1, (-1, p, p)).unflatten(1, (h, w))  # (B, h, w, channels, p, p)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, p * h, p * w)

    def from_image(self, image: Tensor) -> Tensor:
        """The inverse of `to_image`: (B, channels, H, W), whose sides are multiples of `patch`, as tokens (B, N, C)."""
        p = self.patch
        patches = image.unflatten(-1, (-1, p)).unflatten(-3, (-1, p))  # (B, channels, h, p, w, p)
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


PACKED = TokenGeometry(2)
UNPACKED = TokenGeometry(1)
