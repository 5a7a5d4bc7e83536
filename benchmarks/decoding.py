"""What decoding only a box around the edit costs, and how near it comes to decoding the whole picture.

    python -m benchmarks.decoding --out benchmarks/results/decoding.json

The latents are those of the true result, so that only the decoder is measured. `keep_pixels` shows none of the picture
outside the edited cells, and PSNR is against the whole decode, inside them. The decoder's first stages may see the
whole picture (`whole`), the others see the box with `halo` latents around it. What group norms know of the rest of the
picture differs by method:

- "crop": nothing, statistics are the box's own;
- "half", "quarter": statistics of the whole at a half or a quarter of the side, by decimation;
- "calibrated": those of "half", corrected by what the box's differ at full size;
- "patches", "sparse patches": statistics of a quarter or an eighth of the picture, in squares of 8 latents a side;
- "reference": those that an earlier decode of the input has kept, whose cost is not counted;
- "exchanged": the same, with the box's share of the sums exchanged for the edit's.

Autoencoders without group norms need "crop" alone; with Qwen's, "shipped" is what decode="edited" does. Time is that of
the processor, on one thread.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from specedit import micro
from specedit.evaluation import results
from specedit.micro import scenes
from specedit.micro.loading import identity
from specedit.models.shared import decode_boxes
from specedit.models.shared.single_frame_vae import single_frame
from training.micro.families import family_of

KINDS = ("recolor", "remove", "add", "shape")  # other edits change the whole picture
SIZE, CELL, PATCH = 512, 32, 8  # px, px, latents
LARGEST = 0.15  # share of the picture that is edited, in cells
HALOS = (0, 2, 4)
METHODS = ("half", "quarter", "calibrated", "patches", "sparse patches", "reference", "exchanged")
SPLITS = {"nothing": 0, "middle block": 2, "first up block": 3}  # stages that see the whole picture

Stage = Callable[[Tensor], Tensor]


class Moments(NamedTuple):
    """Mean and mean square (B, groups) of what a group norm reads."""

    mean: Tensor
    square: Tensor

    @staticmethod
    def of(x: Tensor, groups: int) -> "Moments":
        rows = x.unflatten(1, (groups, -1)).flatten(2)
        return Moments(rows.mean(-1), rows.square().mean(-1))

    def exchange(self, old: "Moments", new: "Moments", share: float) -> "Moments":
        """These of a whole of which a part, `share` of it, has become another."""
        return Moments(*(whole + share * (b - a) for whole, a, b in zip(self, old, new, strict=True)))

    def calibrate(self, small: "Moments", large: "Moments") -> "Moments":
        """These of a small whole, as of the large one: a part has these moments in the small and the large."""
        mean = self.mean + large.mean - small.mean
        ratio = (large.square - large.mean.square()) / (small.square - small.mean.square()).clamp(min=1e-6)
        return Moments(mean, (self.square - self.mean.square()) * ratio + mean.square())


class GroupNorms(TorchFunctionMode):
    """Inside, `moments(i, x, groups)` says what the i-th group norm normalises by."""

    def __init__(self, moments: Callable[[int, Tensor, int], Moments]) -> None:
        super().__init__()
        self.moments, self.count = moments, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.group_norm:
            return func(*args, **(kwargs or {}))
        return self._norm(*args, **(kwargs or {}))

    def _norm(self, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        mean, square = self.moments(self.count, x, groups)
        self.count += 1
        scale = weight.unflatten(0, (groups, -1)) * (square - mean.square() + eps).rsqrt()[..., None]
        shift = bias.unflatten(0, (groups, -1)) - mean[..., None] * scale
        return torch.addcmul(shift.flatten(1)[..., None, None], x, scale.flatten(1)[..., None, None])


class Box(NamedTuple):
    top: int
    bottom: int
    left: int
    right: int

    def of(self, x: Tensor, scale: float) -> Tensor:
        """This part of x (..., h, w), whose side is `scale` times that of the grid on which the box is drawn."""
        top, bottom, left, right = (round(edge * scale) for edge in self)
        return x[..., top:bottom, left:right]

    def grown(self, by: int, side: int) -> "Box":
        return Box(
            max(self.top - by, 0), min(self.bottom + by, side), max(self.left - by, 0), min(self.right + by, side)
        )

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


def stages(vae: nn.Module) -> list[Stage]:
    """The decoder in parts that follow one another; each up block but the last doubles the side."""
    decoder = vae.decoder
    if hasattr(decoder, "conv_norm_out"):
        head: Stage = nn.Sequential(decoder.conv_norm_out, decoder.conv_act, decoder.conv_out)
    else:
        head = nn.Sequential(decoder.norm_out, decoder.nonlinearity, decoder.conv_out)
    first = decoder.conv_in if vae.post_quant_conv is None else nn.Sequential(vae.post_quant_conv, decoder.conv_in)
    return [first, decoder.mid_block, *decoder.up_blocks, head]


def run(parts: list[Stage], x: Tensor, moments: Callable[[int, Tensor, int], Moments] | None = None) -> Tensor:
    """x through `parts`; group norms as they are, or with these moments."""
    if moments is not None:
        with GroupNorms(moments):
            return run(parts, x)
    for part in parts:
        x = part(x)
    return x


def recorded(parts: list[Stage], x: Tensor, box: Box | None = None, side: int = 1) -> tuple[list, list]:
    """Moments of every group norm's input, over all samples, and those of the `box` alone; `side`: of its grid."""
    whole: list[Moments] = []
    inside: list[Moments] = []

    def note(i: int, x: Tensor, groups: int) -> Moments:
        one = Moments.of(x, groups)
        whole.append(Moments(*(value.mean(0, keepdim=True) for value in one)))
        if box is not None:
            inside.append(Moments.of(box.of(x, x.shape[-1] / side), groups))
        return Moments(*(value.expand(len(x), -1) for value in whole[-1]))

    run(parts, x, note)
    return whole, inside


class Decoder:
    """An autoencoder's decoder, the latents of a reference, and what a decode of it has kept."""

    def __init__(self, vae: nn.Module, reference: Tensor) -> None:
        self.stages, self.reference, self.side = stages(vae), reference, reference.shape[-1]
        self.kept = {
            split: recorded(self.stages[split:], run(self.stages[:split], reference)) for split in SPLITS.values()
        }

    def part(self, latents: Tensor, box: Box, halo: int, split: int, method: str) -> Tensor:
        """The decoded picture inside the box."""
        grown = box.grown(halo, self.side)
        seen, rest = run(self.stages[:split], latents), self.stages[split:]
        out = run(rest, grown.of(seen, seen.shape[-1] / self.side), self._moments(method, seen, rest, split, grown))
        inner = Box(box.top - grown.top, box.bottom - grown.top, box.left - grown.left, box.right - grown.left)
        return inner.of(out, SIZE / self.side)

    def _moments(self, method: str, seen: Tensor, rest: list[Stage], split: int, box: Box):
        if method == "crop":
            return None
        if method == "reference":
            known = self.kept[split][0]
            return lambda i, x, groups: known[i]
        if method == "exchanged":
            known, share = self.kept[split][0], box.area / self.side**2
            old: list[Moments] = []
            before = run(self.stages[:split], self.reference)

            def note(i: int, x: Tensor, groups: int) -> Moments:
                old.append(Moments.of(x, groups))
                return known[i]

            run(rest, box.of(before, before.shape[-1] / self.side), note)
            return lambda i, x, groups: known[i].exchange(old[i], Moments.of(x, groups), share)
        if method.endswith("patches"):
            every = 4 if method == "patches" else 8
            known, _ = recorded(rest, patches(seen, PATCH * seen.shape[-1] // self.side, every))
            return lambda i, x, groups: known[i]
        step = 4 if method == "quarter" else 2
        small, inside = recorded(rest, seen[..., ::step, ::step], box if method == "calibrated" else None, self.side)
        if method == "calibrated":
            return lambda i, x, groups: small[i].calibrate(inside[i], Moments.of(x, groups))
        return lambda i, x, groups: small[i]


def shipped(vae: nn.Module, latents: Tensor, cells: Tensor) -> Tensor:
    """The picture as decode="edited" has it."""
    height, width = latents.shape[-2:]
    boxes, _ = decode_boxes.plan(vae, cells[None], CELL * height // SIZE, height, width)
    return decode_boxes.decode(vae, latents, boxes)


def patches(x: Tensor, side: int, every: int) -> Tensor:
    """One in `every` of the squares (n, C, side, side) of x (1, C, h, w), in each row other columns."""
    rows = x[0].unfold(1, side, side).unfold(2, side, side)  # (C, r, c, side, side)
    chosen = [rows[:, i, 3 * i % every :: every] for i in range(rows.shape[1])]
    return torch.cat(chosen, 1).transpose(0, 1).contiguous()


def edits(pipe: Any, count: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Seed, latents of the input and of the true result, and the edited cells, of `count` small edits."""
    seed = 700
    while count:
        scene = scenes.describe(seed, KINDS[count % len(KINDS)])
        source, target, mask = scenes.draw([scene], SIZE, SIZE)
        cells = F.max_pool2d(mask[None].float(), CELL)[0, 0] > 0
        if cells.float().mean() <= LARGEST:
            encode = family_of(pipe).latents
            yield seed, *(encode(pipe.vae, picture * 2 - 1) for picture in (source, target)), cells
            count -= 1
        seed += 1


def timed(work: Callable[[], Tensor], repeat: int) -> tuple[Tensor, float]:
    """What the work returns, and the fewest seconds of the processor that it took."""
    taken = []
    for _ in range(repeat):
        began = time.process_time()
        out = work()
        taken.append(time.process_time() - began)
    return out, min(taken)


def psnr(a: Tensor, b: Tensor) -> float:
    return -10 * float((a - b).square().mean().clamp(min=1e-12).log10())


def bounds(cells: Tensor, scale: int) -> Box:
    """The box around the true cells, in units of which a cell has `scale` a side."""
    rows, columns = cells.any(1).nonzero()[:, 0], cells.any(0).nonzero()[:, 0]
    return Box(*(scale * int(v) for v in (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)))


def ways(vae: nn.Module) -> Iterator[tuple[str, int, str]]:
    """Method, halo in latents, and what of the decoder sees the whole picture."""
    normed = any(isinstance(module, nn.GroupNorm) for module in vae.decoder.modules())
    for whole in ("nothing", "first up block"):
        for halo in HALOS:
            yield "crop", halo, whole
        for method in METHODS if normed else ():
            yield method, HALOS[-1], whole
    for method in ("patches", "sparse patches") if normed else ():
        yield method, HALOS[-1], "middle block"
    if decode_boxes.why_whole(vae) is None:
        yield "shipped", decode_boxes.halo(vae), "first up block"


@torch.no_grad()
def measure(pipe: Any, count: int, repeat: int) -> list[dict[str, Any]]:
    """One row for each way of decoding, over all edits."""
    found: dict[tuple, list[tuple[float, float, float, float]]] = {way: [] for way in ways(pipe.vae)}
    for _, reference, latents, cells in tqdm(edits(pipe, count), total=count):
        if getattr(pipe.vae.decoder, "conv_norm_out", None) is None:
            reference, latents = (x.unsqueeze(2) if x.ndim == 4 else x for x in (reference, latents))
        reference, latents = (denormalised(pipe.vae, x) for x in (reference, latents))
        with single_frame(pipe.vae):
            decoder = Decoder(pipe.vae, reference)
            whole, seconds = timed(partial(run, decoder.stages, latents), repeat)
            box = bounds(cells, CELL * decoder.side // SIZE)
            inside = box.of(cells.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1), SIZE // decoder.side)
            true = box.of(whole, SIZE // decoder.side)
            for method, halo, split in found:
                if method == "shipped":
                    work = lambda: box.of(shipped(pipe.vae, latents, cells), SIZE // decoder.side)  # noqa: B023, E731
                else:
                    work = lambda: decoder.part(latents, box, halo, SPLITS[split], method)  # noqa: B023, E731
                got, taken = timed(work, repeat)
                if method == "shipped":
                    got = got.unsqueeze(2)
                own, given = ((x.clamp(-1, 1) / 2)[..., inside] for x in (true, got))
                found[method, halo, split].append((psnr(own, given), taken, seconds, float(cells.float().mean())))
    return [row(*way, *zip(*values, strict=True)) for way, values in found.items()]


def row(method: str, halo: int, whole: str, psnrs, taken, seconds, shares) -> dict[str, Any]:
    return dict(
        method=method, halo=halo, whole=whole, psnr_min=min(psnrs), psnr_median=statistics.median(psnrs),
        time_ratio=statistics.median(a / b for a, b in zip(taken, seconds, strict=True)),
        edited_median=statistics.median(shares), edits=len(psnrs),
    )  # fmt: skip


def denormalised(vae: nn.Module, latents: Tensor) -> Tensor:
    config = vae.config
    if getattr(config, "latents_mean", None) is None:
        return latents / config.scaling_factor + config.shift_factor
    mean, std = (
        torch.tensor(x).view(1, -1, *[1] * (latents.ndim - 2)) for x in (config.latents_mean, config.latents_std)
    )
    return latents * std + mean


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--edits", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, weights = [], {}
    for name in ("kontext", "qwen"):
        pipe = micro.load(name)
        weights[name] = identity(name, "vae")["weights"]
        rows += [
            dict(model=name, autoencoder=type(pipe.vae).__name__, **one)
            for one in measure(pipe, args.edits, args.repeat)
        ]
    command = f"python -m benchmarks.decoding --edits {args.edits} --repeat {args.repeat}"
    results.write(args.out, command, rows, weights=weights)


if __name__ == "__main__":
    main()
