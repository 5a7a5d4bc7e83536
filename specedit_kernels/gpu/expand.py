"""Noise-exact resolution changes: a coarse token to its four children and back, in one launch each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from . import launch
from .prepared import Launch


@triton.jit
def _cos_sin_turns(u):
    """cos(2 pi u) and sin(2 pi u) for u in [0, 1), by polynomials within an eighth of a turn of each axis.

    The library's functions reduce arguments of any size and need a stack frame for that; u in [0, 1) does not.
    Coefficients are those of Cephes' sinf and cosf, with an error below 1e-7.
    """
    quarter = tl.floor(4.0 * u + 0.5)
    x = (u - 0.25 * quarter) * 6.283185307179586  # [-pi / 4, pi / 4]
    z = x * x
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    quadrant = quarter.to(tl.int32) & 3
    swap = (quadrant & 1) == 1
    c, s = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    return tl.where((quadrant == 1) | (quadrant == 2), -c, c), tl.where(quadrant >= 2, -s, s)


@triton.jit
def _normals(seed, pixel, token):
    """Three standard normals per latent pixel: Box-Muller on one Philox call with counter (pixel, token, 0, 0)."""
    zero = tl.zeros_like(pixel)
    w0, w1, w2, w3 = tl.philox(seed, pixel, token, zero, zero)
    u0, u1 = tl.random.uint_to_uniform_float(w0), tl.random.uint_to_uniform_float(w1)
    u2, u3 = tl.random.uint_to_uniform_float(w2), tl.random.uint_to_uniform_float(w3)
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(u0, 1.0e-7)))
    other_radius = tl.sqrt(-2.0 * tl.log(tl.maximum(u2, 1.0e-7)))
    cos1, sin1 = _cos_sin_turns(u1)
    cos3, _ = _cos_sin_turns(u3)
    return radius * cos1, radius * sin1, other_radius * cos3


@triton.jit(do_not_specialize=["tokens", "signal", "noise_level", "detail_level"],
            do_not_specialize_on_alignment=["seed"])  # fmt: skip
def expand(
    coarse, fine, noise, seed, detail, tokens, signal, noise_level, detail_level,
    coarse_sample, coarse_token, coarse_channel,
    PATCH: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_P2: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    HAS_NOISE: tl.constexpr, HAS_DETAIL: tl.constexpr, SEED_PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """c = [signal * z, d1, d2, d3],  d = detail_level * detail + noise_level * noise
    f00 = (c0 + c1 + c2 + c3) / 2,  f01 = (c0 - c1 + c2 - c3) / 2
    f10 = (c0 + c1 - c2 - c3) / 2,  f11 = (c0 - c1 - c2 + c3) / 2

    One program computes the children of BLOCK_TOKENS tokens of one sample. With PATCH 2, pixel (a, b) of a coarse token
    becomes the four pixels of child 2a + b; moving the pixel axis before the channels gives the children's order. With
    PATCH 1, a coarse token is one pixel, and each child takes one f.
    """
    COARSE_PIXELS: tl.constexpr = PATCH * PATCH
    PIXELS: tl.constexpr = COARSE_PIXELS * CHANNELS_P2
    token_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    sample = (tl.program_id(0) // token_tiles).to(tl.int64)
    m = (tl.program_id(0) % token_tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)  # [BT]
    flat = tl.arange(0, PIXELS)  # [P]
    here = (m < tokens)[:, None]  # [BT, 1]

    source = coarse + sample * coarse_sample + m.to(tl.int64)[:, None] * coarse_token + flat[None, :] * coarse_channel
    in_token = (flat < COARSE_PIXELS * CHANNELS)[None, :]
    z = tl.load(source, mask=here & in_token, other=0).to(tl.float32)  # [BT, channel-major P]
    if PATCH == 2:
        z = tl.reshape(z, (BLOCK_TOKENS, CHANNELS_P2, 4))
        z = tl.reshape(tl.permute(z, (0, 2, 1)), (BLOCK_TOKENS, PIXELS))  # [BT, pixel-major P]

    channel = flat % CHANNELS_P2
    pixel = flat // CHANNELS_P2 * CHANNELS + channel  # [P]
    inside = here & (channel < CHANNELS)[None, :]  # [BT, P]
    row = sample * tokens + m  # [BT], int64
    at = row[:, None] * (COARSE_PIXELS * CHANNELS) + pixel[None, :]  # [BT, P]
    triple = at * 3
    if HAS_NOISE:
        n1 = tl.load(noise + triple, mask=inside, other=0).to(tl.float32)
        n2 = tl.load(noise + triple + 1, mask=inside, other=0).to(tl.float32)
        n3 = tl.load(noise + triple + 2, mask=inside, other=0).to(tl.float32)
    else:
        counter = m[:, None] if SEED_PER_SAMPLE else row.to(tl.int32)[:, None]
        zero = tl.zeros((BLOCK_TOKENS, PIXELS), dtype=tl.int32)
        key = tl.load(seed + sample) if SEED_PER_SAMPLE else tl.load(seed)
        n1, n2, n3 = _normals(key, pixel[None, :] + zero, counter + zero)
    d1, d2, d3 = n1 * noise_level, n2 * noise_level, n3 * noise_level
    if HAS_DETAIL:
        d1 += detail_level * tl.load(detail + triple, mask=inside, other=0).to(tl.float32)
        d2 += detail_level * tl.load(detail + triple + 1, mask=inside, other=0).to(tl.float32)
        d3 += detail_level * tl.load(detail + triple + 2, mask=inside, other=0).to(tl.float32)

    c0 = z * signal
    f00, f01 = (c0 + d1 + d2 + d3) * 0.5, (c0 - d1 + d2 - d3) * 0.5
    f10, f11 = (c0 + d1 - d2 - d3) * 0.5, (c0 - d1 - d2 + d3) * 0.5
    element = fine.dtype.element_ty
    if PATCH == 2:  # the four pixels lie side by side in their child
        block = tl.join(tl.join(f00, f10), tl.join(f01, f11))  # [BT, P, 2, 2], rows then columns
        block = tl.reshape(block, (BLOCK_TOKENS, PIXELS, 4))
        target = fine + at[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        tl.store(target, block.to(element), mask=inside[:, :, None])
    else:  # they lie in four children, a whole token apart
        target = fine + row[:, None] * (4 * CHANNELS) + channel[None, :]  # [BT, P]
        tl.store(target, f00.to(element), mask=inside)
        tl.store(target + CHANNELS, f01.to(element), mask=inside)
        tl.store(target + 2 * CHANNELS, f10.to(element), mask=inside)
        tl.store(target + 3 * CHANNELS, f11.to(element), mask=inside)


@triton.jit(do_not_specialize=["tokens", "factor"])
def contract(
    fine, coarse, tokens, factor, fine_sample, fine_token, fine_child, fine_channel,
    PATCH: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_P2: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """z = factor * (f00 + f01 + f10 + f11),  factor = (1 + s) / 4

    With PATCH 2 the sum runs over the pixels of each child, and child 2a + b becomes pixel (a, b). With PATCH 1 it runs
    over the four children.
    """
    COARSE_PIXELS: tl.constexpr = PATCH * PATCH
    PIXELS: tl.constexpr = COARSE_PIXELS * CHANNELS_P2
    token_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    sample = (tl.program_id(0) // token_tiles).to(tl.int64)
    m = (tl.program_id(0) % token_tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)  # [BT]
    flat = tl.arange(0, PIXELS)  # [P]
    here = (m < tokens)[:, None]  # [BT, 1]
    channel = flat % CHANNELS_P2
    inside = here & (channel < CHANNELS)[None, :]  # [BT, P]
    rows = sample * fine_sample + m.to(tl.int64)[:, None] * fine_token  # [BT, 1]
    if PATCH == 2:
        child = flat // CHANNELS_P2
        pixels = child[None, :] * fine_child + channel[None, :] * (4 * fine_channel)  # [1, P]
        source = fine + (rows + pixels)[:, :, None] + tl.arange(0, 4)[None, None, :] * fine_channel  # [BT, P, 4]
        block = tl.load(source, mask=inside[:, :, None], other=0).to(tl.float32)
        z = tl.reshape(tl.sum(block, axis=2) * factor, (BLOCK_TOKENS, 4, CHANNELS_P2))
        z = tl.reshape(tl.permute(z, (0, 2, 1)), (BLOCK_TOKENS, PIXELS))  # [BT, channel-major P]
    else:
        source = fine + rows + channel[None, :] * fine_channel  # [BT, P]
        f00 = tl.load(source, mask=inside, other=0).to(tl.float32)
        f01 = tl.load(source + fine_child, mask=inside, other=0).to(tl.float32)
        f10 = tl.load(source + 2 * fine_child, mask=inside, other=0).to(tl.float32)
        f11 = tl.load(source + 3 * fine_child, mask=inside, other=0).to(tl.float32)
        z = (f00 + f01 + f10 + f11) * factor
    target = coarse + (sample * tokens + m)[:, None] * (COARSE_PIXELS * CHANNELS) + flat[None, :]
    tl.store(target, z.to(coarse.dtype.element_ty), mask=here & (flat < COARSE_PIXELS * CHANNELS)[None, :])


def tiles(config: launch.Config, channels: int, patch: int = 2) -> launch.Config:
    """Compile-time constants and warps of either kernel, for tokens of `patch` x `patch` pixels of `channels`.

    They do not depend on the number of tokens, so an image of another size never compiles anything.
    """
    padded = launch.next_power_of_2(channels)
    block = max(1, config["tile_pixels"] // (patch * patch * padded))
    constants = {"PATCH": patch, "CHANNELS": channels, "CHANNELS_P2": padded, "BLOCK_TOKENS": block}
    return constants | {"num_warps": config["num_warps"]}


def prepare_expand(
    coarse: torch.Tensor,
    sigma: float,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    detail: torch.Tensor | None,
    patch: int = 2,
    out: torch.Tensor | None = None,
    tuned: dict[str, launch.Config] | None = None,
) -> Callable[..., torch.Tensor]:
    """What launches the kernel on tensors like these, at this sigma."""
    launch.check_dtype("coarse", coarse)
    *lead, tokens, width = coarse.shape
    sigma_fine = 2 * sigma / (1 + sigma)
    # Tuned for packed tokens of this width.
    config = launch.shipped_config("expand", coarse.device, tuned, channels=width // 4)
    constants = tiles(config, width // (patch * patch), patch)
    warps = constants.pop("num_warps")
    samples = math.prod(lead)
    start = Launch(expand, (samples * launch.ceil_div(tokens, constants["BLOCK_TOKENS"]), 1, 1), num_warps=warps)
    strides = coarse.reshape(samples, tokens, width).stride()
    fixed = (
        tokens, 2 / (1 + sigma), sigma_fine, 1 - sigma_fine, *strides, *constants.values(),
        noise is not None, detail is not None, seed is not None and seed.numel() > 1,
    )  # fmt: skip

    def call(
        coarse: torch.Tensor,
        sigma: float,
        noise: torch.Tensor | None,
        seed: torch.Tensor | None,
        detail: torch.Tensor | None,
        patch: int = 2,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        fine = coarse.new_empty((*lead, tokens, 4, width)) if out is None else out
        if fine.numel():
            noise, detail = (None if x is None else x.contiguous() for x in (noise, detail))
            start(coarse.reshape(samples, tokens, width), fine, noise, seed, detail, *fixed)
        return fine

    return call


def prepare_contract(
    fine: torch.Tensor,
    sigma_fine: float,
    patch: int = 2,
    out: torch.Tensor | None = None,
    tuned: dict[str, launch.Config] | None = None,
) -> Callable[..., torch.Tensor]:
    """What launches the kernel on tensors like these, at this sigma."""
    launch.check_dtype("fine", fine)
    *lead, tokens, _, width = fine.shape
    config = launch.shipped_config("contract", fine.device, tuned, channels=width // 4)
    constants = tiles(config, width // (patch * patch), patch)
    warps = constants.pop("num_warps")
    samples = math.prod(lead)
    start = Launch(contract, (samples * launch.ceil_div(tokens, constants["BLOCK_TOKENS"]), 1, 1), num_warps=warps)
    strides = fine.reshape(samples, tokens, 4, width).stride()
    fixed = tokens, (1 + sigma_fine / (2 - sigma_fine)) / 4, *strides, *constants.values()

    def call(fine: torch.Tensor, sigma: float, patch: int = 2, out: torch.Tensor | None = None) -> torch.Tensor:
        coarse = fine.new_empty((*lead, tokens, width)) if out is None else out
        if coarse.numel():
            start(fine.reshape(samples, tokens, 4, width), coarse, *fixed)
        return coarse

    return call
