"""What decoding only a box around the edit costs, and how near it comes to decoding the whole picture.

    python -m benchmarks.decoding --out benchmarks/results/decoding.json

The latents are those of the true result, so that only the decoder is measured. `keep_pixels` shows none of the picture
outside the edited cells, and PSNR is against the whole decode, inside them. The decoder's first stages may see the
whole picture (`whole`), the others see the box with `halo` latents around it. What group norms know of the rest of the
picture differs by method:

- "crop": nothing, statistics are the box's own;
- "half", "quarter": statistics of the whole at a half or a quarter of the side, by decimation;
- "calibrated": those of "half", corrected by what the box's differ at full size;
- "squares", "sparse squares": statistics of a quarter or an eighth of the picture, in squares of 8 latents a side;
- "reference": those that an earlier decode of the input has kept, whose cost is not counted;
- "exchanged": the same, with the box's share of the sums exchanged for the edit's.

Autoencoders without group norms need "crop" alone. "shipped" is what decode="edited" does, which takes "squares" for
group norms, and fewer of them in larger pictures. Time is that of the processor, on one thread.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm.auto import tqdm

from specedit import micro
from specedit.evaluation import results
from specedit.micro import scenes
from specedit.micro.loading import identity
from specedit.models.shared import decode_boxes
from specedit.models.shared.decode_boxes import Box
from specedit.models.shared.sampled_norms import GroupNorms, Moments, Stage, recorded, run, squares
from specedit.models.shared.single_frame_vae import single_frame
from training.micro.families import family_of

KINDS = ("recolor", "remove", "add", "shape")  # other edits change the whole picture
SIZES = (512, 1024)  # px a side; the larger for "shipped" alone
CELL, LATENT = 32, 8  # px
LARGEST = 0.15  # share of the picture that is edited, in cells
HALOS = (0, 2, 4)
STEPS = {"half": 2, "quarter": 4, "calibrated": 2}  # of the decimation
EVERY = {"squares": 4, "sparse squares": 8}
METHODS = (*STEPS, *EVERY, "reference", "exchanged")
SPLITS = {"nothing": 0, "middle block": 2, "first up block": 3}  # stages that see the whole picture


def exchange(whole: Moments, old: Moments, new: Moments, share: float) -> Moments:
    """Moments of a whole of which a part, `share` of it, has become another."""
    mean = whole.mean + share * (new.mean - old.mean)
    square, before, after = (one.variance + one.mean.square() for one in (whole, old, new))
    return Moments(mean, square + share * (after - before) - mean.square())


def calibrate(whole: Moments, small: Moments, large: Moments) -> Moments:
    """Moments of a small whole, as of the large one: a part has these moments in the small and the large."""
    ratio = large.variance / small.variance.clamp(min=1e-6)
    return Moments(whole.mean + large.mean - small.mean, whole.variance * ratio)


def cut(x: Tensor, box: Box, side: int) -> Tensor:
    """The box of x (..., h, w), drawn on a grid with `side` cells a side."""
    scale = x.shape[-1] / side
    return Box(*(round(edge * scale) for edge in box)).of(x)


def recorded_inside(parts: list[Stage], x: Tensor, box: Box, side: int) -> tuple[list[Moments], list[Moments]]:
    """Moments of every group norm's input, and those inside the box alone."""
    whole: list[Moments] = []
    inside: list[Moments] = []

    def note(i: int, x: Tensor, groups: int) -> Moments:
        whole.append(Moments.of(x, groups))
        inside.append(Moments.of(cut(x, box, side), groups))
        return whole[i]

    with GroupNorms(note):
        run(parts, x)
    return whole, inside


class Decoder:
    """An autoencoder's decoder, the latents of a reference, and what a decode of it has kept."""

    def __init__(self, vae: nn.Module, reference: Tensor) -> None:
        self.stages, self.reference, self.side = decode_boxes.stages(vae), reference, reference.shape[-1]
        self.kept: dict[int, list[Moments]] = {}

    def keep(self) -> None:
        """Decode the reference, for the methods that need it."""
        for split in SPLITS.values():
            self.kept[split] = recorded(self.stages[split:], run(self.stages[:split], self.reference))

    def part(self, latents: Tensor, box: Box, halo: int, split: int, method: str) -> Tensor:
        """The decoded picture inside the box."""
        grown = box.grown(halo, self.side, self.side)
        seen, rest = run(self.stages[:split], latents), self.stages[split:]
        part, moments = cut(seen, grown, self.side), self._moments(method, seen, rest, split, grown)
        with contextlib.nullcontext() if moments is None else GroupNorms(moments):
            out = run(rest, part)
        return box.within(grown).times(LATENT).of(out)

    def _moments(self, method: str, seen: Tensor, rest: list[Stage], split: int, box: Box):
        if method == "crop":
            return None
        if method == "reference":
            known = self.kept[split]
            return lambda i, x, groups: known[i]
        if method == "exchanged":
            known, share = self.kept[split], box.area / self.side**2
            old: list[Moments] = []
            before = run(self.stages[:split], self.reference)

            def note(i: int, x: Tensor, groups: int) -> Moments:
                old.append(Moments.of(x, groups))
                return known[i]

            with GroupNorms(note):
                run(rest, cut(before, box, self.side))
            return lambda i, x, groups: exchange(known[i], old[i], Moments.of(x, groups), share)
        if method in EVERY:
            side = decode_boxes.SQUARE * seen.shape[-1] // self.side
            known = recorded(rest[:-1], squares(seen, side, EVERY[method]))
            return lambda i, x, groups: known[i]
        small = seen[..., :: STEPS[method], :: STEPS[method]]
        if method == "calibrated":
            known, inside = recorded_inside(rest, small, box, self.side)
            return lambda i, x, groups: calibrate(known[i], inside[i], Moments.of(x, groups))
        known = recorded(rest[:-1], small)
        return lambda i, x, groups: known[i]


def shipped(vae: nn.Module, latents: Tensor, cells: Tensor) -> Tensor:
    """The picture as decode="edited" has it."""
    height, width = latents.shape[-2:]
    boxes, _ = decode_boxes.plan(vae, cells[None], CELL // LATENT, height, width)
    return decode_boxes.decode(vae, latents, boxes)


def edits(pipe: Any, size: int, count: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Seed, latents of the input and of the true result, and the edited cells, of `count` small edits."""
    seed = 700
    while count:
        scene = scenes.describe(seed, KINDS[count % len(KINDS)])
        source, target, mask = scenes.draw([scene], size, size)
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
    """Method, halo in latents, and what of the decoder sees the whole picture; the last is what is shipped."""
    normed = any(isinstance(module, nn.GroupNorm) for module in vae.decoder.modules())
    for whole in ("nothing", "first up block"):
        for halo in HALOS:
            yield "crop", halo, whole
        for method in METHODS if normed else ():
            yield method, HALOS[-1], whole
    for method in EVERY if normed else ():
        yield method, HALOS[-1], "middle block"
    yield "shipped", decode_boxes.halo(vae), "first up block"


@torch.no_grad()
def measure(pipe: Any, size: int, count: int, repeat: int, only: slice) -> list[dict[str, Any]]:
    """One row for each way of decoding, or `only` some of them, over all edits."""
    found: dict[tuple, list[tuple[float, float, float, float]]] = {way: [] for way in list(ways(pipe.vae))[only]}
    for _, reference, latents, cells in tqdm(edits(pipe, size, count), total=count):
        if getattr(pipe.vae.decoder, "conv_norm_out", None) is None:
            reference, latents = (x.unsqueeze(2) if x.ndim == 4 else x for x in (reference, latents))
        reference, latents = (denormalised(pipe.vae, x) for x in (reference, latents))
        with single_frame(pipe.vae):
            decoder = Decoder(pipe.vae, reference)
            if len(found) > 1:
                decoder.keep()
            whole, seconds = timed(partial(run, decoder.stages, latents), repeat)
            box = bounds(cells, CELL // LATENT)
            pixels = box.times(LATENT)
            inside = pixels.of(cells.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1))
            true = pixels.of(whole)
            for method, halo, split in found:
                if method == "shipped":
                    work = lambda: pixels.of(shipped(pipe.vae, latents, cells))  # noqa: B023, E731
                else:
                    work = lambda: decoder.part(latents, box, halo, SPLITS[split], method)  # noqa: B023, E731
                got, taken = timed(work, repeat)
                own, given = ((x.clamp(-1, 1) / 2)[..., inside].flatten(0, -2) for x in (true, got))
                found[method, halo, split].append((psnr(own, given), taken, seconds, float(cells.float().mean())))
    return [dict(size=size, **row(*way, *zip(*values, strict=True))) for way, values in found.items()]


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
    parser.add_argument("--vae", help='hub id or folder of a pipeline: only "shipped", with its AutoencoderKL')
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows, weights, options = [], {}, f"--edits {args.edits} --repeat {args.repeat}"
    for name in ("kontext",) if args.vae else ("kontext", "qwen"):
        pipe = micro.load(name)
        if args.vae:
            pipe.vae = AutoencoderKL.from_pretrained(args.vae, subfolder="vae")
            name, options = args.vae, f"{options} --vae {args.vae}"
        else:
            weights[name] = identity(name, "vae")["weights"]
        for size in SIZES:
            only = slice(None) if size == SIZES[0] and not args.vae else slice(-1, None)
            measured = measure(pipe, size, args.edits, args.repeat, only)
            rows += [dict(model=name, autoencoder=type(pipe.vae).__name__, **one) for one in measured]
    results.write(args.out, f"python -m benchmarks.decoding {options}", rows, weights=weights)


if __name__ == "__main__":
    main()
