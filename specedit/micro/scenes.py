"""Procedural editing tasks with exact ground truth: a scene, an instruction, and the scene after it.

A seed fixes a scene in resolution-free coordinates, which can be drawn at any size. Evaluation uses seeds below
`TRAINING_SEED`, training the others, so that they never share a scene.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import photos
from .render import Backdrop, Thing, backdrop, compose, coverage
from .textures import texture
from .vocabulary import ALL_KINDS, BACKGROUNDS, COLOURS, KINDS, MATERIALS, PHRASES, PLACES, SHAPES, SIZES

TRAINING_SEED = 2**40
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Scene:
    """A scene before and after the edit, and the instruction."""

    kind: str
    prompt: str
    before: tuple[Thing, ...]
    after: tuple[Thing, ...]
    background: Backdrop
    new_background: Backdrop

    @property
    def place(self) -> tuple[int, int] | None:
        """Column and row of the edited object on the 3 x 3 board; None if the whole picture is edited."""
        if self.kind in ("background", "greyscale") or (self.kind == "texture" and self.after == self.before):
            return None
        return _cell((self.after if self.kind == "add" else self.before)[0])

    @property
    def material(self) -> str | None:
        """The material that a texture asks for; None for other kinds."""
        if self.kind != "texture":
            return None
        return self.new_background.material if self.place is None else self.after[0].material


@dataclass(frozen=True)
class Case:
    """One editing task: `source` and `target` images, the instruction, `mask` (H, W) bool of the pixels that differ.

    A texture's `target` is one of many right answers, see `fresh`. It has a `material`, its `mask` is all that the
    material touches, and `region` (H, W) bool is what it fills entirely, without an object's blended edge.
    """

    source: Image.Image
    target: Image.Image
    prompt: str
    mask: np.ndarray
    kind: str
    seed: int
    material: str | None = None
    region: np.ndarray | None = None


def sample(seed: int, size: int | tuple[int, int] = 512, kind: str | None = None) -> Case:
    """Draw one task. `size`: pixels, a side or (height, width).

    `kind`: one of `ALL_KINDS`, or None for one of `KINDS`, drawn from the seed.
    """
    height, width = _size(size)
    return _case(describe(seed, kind), seed, height, width)


def fresh(case: Case, seed: int) -> Case:
    """The same task with another right answer as its target: the same material, drawn from `seed`.

    Raises:
        ValueError: a task of another kind than "texture", or a seed below 0.
    """
    if case.kind != "texture":
        raise ValueError(f"case: expected the kind texture, whose right answers are many, got {case.kind}")
    return _case(retextured(describe(case.seed, case.kind), seed), case.seed, case.source.height, case.source.width)


def retextured(scene: Scene, seed: int) -> Scene:
    """A scene of kind "texture" whose material is drawn from another `seed`."""
    if scene.place is None:
        return replace(scene, new_background=replace(scene.new_background, seed=seed))
    return replace(scene, after=(replace(scene.after[0], seed=seed), *scene.after[1:]))


def _case(scene: Scene, seed: int, height: int, width: int) -> Case:
    source, target, mask = (part[0] for part in draw([scene], height, width))
    region = filled(scene, height, width).numpy() if scene.kind == "texture" else None
    return Case(
        _picture(source), _picture(target), scene.prompt, mask.numpy(), scene.kind, seed, scene.material, region
    )


def filled(
    scene: Scene, height: int, width: int, window: Tensor | None = None, device: str | torch.device = "cpu"
) -> Tensor:
    """Where a texture's material is seen and nothing else, (h, w) bool. `window` (1, 4): the part, as in `draw`."""
    alone = scene.after[:1] if scene.place is not None else scene.after
    part = None if window is None else window.expand(len(alone), -1)
    covered = coverage(alone, height, width, part, device)
    return (covered >= 1).any(0) if scene.place is not None else (covered <= 0).all(0)


def describe(seed: int, kind: str | None = None) -> Scene:
    """The scene of a seed, before it is drawn."""
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed: expected an integer >= 0, got {seed!r}")
    if kind is not None and kind not in ALL_KINDS:
        raise ValueError(f"kind: expected one of {', '.join(ALL_KINDS)}, got {kind!r}")
    rng = np.random.default_rng(seed)
    drawn = str(rng.choice(KINDS, p=[0.2, 0.2, 0.2, 0.2, 0.1, 0.1]))
    kind = kind or drawn
    things = _things(rng)
    background = _background(rng, training=seed >= TRAINING_SEED)
    after, new_background, fields = things, background, {}
    chosen = things[0]
    fields["object"] = _reference(rng, chosen, things)
    if kind == "recolor":
        colour = _other(rng, COLOURS, chosen.colour)
        after = (replace(chosen, colour=colour), *things[1:])
        fields["colour"] = colour
    elif kind == "remove":
        after = things[1:]
    elif kind == "shape":
        shape = _other(rng, SHAPES, chosen.shape)
        after = (replace(chosen, shape=shape), *things[1:])
        fields["shape"] = shape
    elif kind == "add":
        # The chosen object is added, with canonical place and size, so that the prompt determines the picture.
        word = str(rng.choice(list(SIZES)))
        place = next(p for p, cell in PLACES.items() if cell == _cell(chosen))
        column, row = PLACES[place]
        new = replace(chosen, x=(column + 0.5) / 3, y=(row + 0.5) / 3, r=SIZES[word])
        things, after = things[1:], (new, *things[1:])
        fields |= {"new": " ".join(filter(None, (word, new.colour, new.shape))), "place": place}
    elif kind == "background":
        new_background, fields["background"] = _asked_background(rng, taken=[t.colour for t in things])
    elif kind == "texture":
        material, texture_seed = str(rng.choice(MATERIALS)), int(rng.integers(2**31))
        fields["material"] = material
        if rng.random() < 0.5:
            fields["region"] = "background"
            new_background = Backdrop("texture", material=material, seed=texture_seed)
        else:
            fields["region"] = fields["object"]
            after = (replace(chosen, material=material, seed=texture_seed), *things[1:])
    phrase = str(rng.choice(PHRASES[kind]))
    return Scene(kind, phrase.format(**fields), things, after, background, new_background)


def draw(
    scenes: Sequence[Scene],
    height: int,
    width: int,
    window: Tensor | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw scenes: source and target (n, 3, h, w) float32 in 0..1 and mask (n, h, w) bool.

    `window` (n, 4): top, left, h, w of the part to draw, in pixels of the whole image.
    """
    catalogue = photos.load().to(device)
    owner, things = [], []
    for i, scene in enumerate(scenes):
        for thing in dict.fromkeys(scene.before + scene.after):
            owner.append(i)
            things.append(thing)
    alpha = coverage(things, height, width, None if window is None else window[owner], device)
    at = {(i, thing): k for k, (i, thing) in enumerate(zip(owner, things, strict=True))}
    before = backdrop([s.background for s in scenes], height, width, catalogue, window, device)
    source = _paint(before, [s.before for s in scenes], alpha, at, height, width, window)
    changed = [i for i, s in enumerate(scenes) if s.new_background != s.background]
    after = before
    if changed:
        after = before.clone()
        part = None if window is None else window[changed]
        after[changed] = backdrop([scenes[i].new_background for i in changed], height, width, catalogue, part, device)
    target = _paint(after, [s.after for s in scenes], alpha, at, height, width, window)
    grey = [i for i, s in enumerate(scenes) if s.kind == "greyscale"]
    if grey:
        luma = torch.tensor(_LUMA, device=device).view(1, 3, 1, 1)
        target[grey] = (source[grey] * luma).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    mask = (source - target).abs().amax(1) > 2 / 255
    for i in (i for i, s in enumerate(scenes) if s.kind == "texture"):  # also where it happens to look the same
        covered = alpha[[at[i, thing] for thing in scenes[i].after]]
        mask[i] |= (covered < 1).all(0) if scenes[i].place is None else covered[0] > 0
    return source, target, mask


def _paint(
    background: Tensor, lists: list[tuple[Thing, ...]], alpha: Tensor, at: dict, height: int, width: int,
    window: Tensor | None,
) -> Tensor:  # fmt: skip
    image = background.clone()
    for slot in range(max((len(things) for things in lists), default=0)):
        rows = [i for i, things in enumerate(lists) if len(things) > slot]
        layer = alpha[[at[i, lists[i][slot]] for i in rows]]
        colour = torch.tensor([rgb(lists[i][slot].colour) for i in rows], dtype=torch.float32, device=alpha.device)
        textured = [(k, lists[i][slot], i) for k, i in enumerate(rows) if lists[i][slot].material]
        if textured:
            colour = colour[:, :, None, None].repeat(1, 1, *image.shape[-2:])
        for k, thing, i in textured:
            top, left = (0, 0) if window is None else (int(v) for v in window[i, :2])
            _fill(colour[k], thing, height, width, top, left)
        image[rows] = compose(image[rows], [layer], [colour])
    return image


def _fill(colour: Tensor, thing: Thing, height: int, width: int, top: int, left: int) -> None:
    """Draw the thing's material around it into `colour` (3, h, w), the window of the picture at (top, left)."""
    reach = 1.5 * thing.r * min(height, width) + 2
    (y0, y1), (x0, x1) = (
        (min(max(int(centre - reach) - first, 0), side), min(max(int(centre + reach) - first, 0), side))
        for centre, first, side in zip((thing.y * height, thing.x * width), (top, left), colour.shape[-2:], strict=True)
    )
    if y1 > y0 and x1 > x0:
        part = texture(thing.material, thing.seed, y1 - y0, x1 - x0, colour.device, top + y0, left + x0)
        colour[:, y0:y1, x0:x1] = part


def _things(rng: np.random.Generator) -> tuple[Thing, ...]:
    """One to five objects in different cells of a 3 x 3 board; no two share both shape and colour, none overlap."""
    count = int(rng.integers(1, 6))
    cells = rng.permutation(9)[:count]
    looks = rng.permutation(len(SHAPES) * len(COLOURS))[:count]
    out = []
    for cell, look in zip(cells, looks, strict=True):
        dx, dy = rng.uniform(-0.015, 0.015, 2)
        out.append(
            Thing(
                shape=SHAPES[look % len(SHAPES)],
                colour=list(COLOURS)[look // len(SHAPES)],
                x=(cell % 3 + 0.5) / 3 + dx,
                y=(cell // 3 + 0.5) / 3 + dy,
                r=float(rng.uniform(0.10, 0.15)),
            )
        )
    return tuple(out)


def _cell(thing: Thing) -> tuple[int, int]:
    return int(thing.x * 3), int(thing.y * 3)


def _reference(rng: np.random.Generator, chosen: Thing, things: Sequence[Thing]) -> str:
    """A phrase that identifies one object: colour and shape, or the shape alone if it is unique."""
    alone = sum(t.shape == chosen.shape for t in things) == 1
    return chosen.shape if alone and rng.random() < 0.25 else f"{chosen.colour} {chosen.shape}"


def _background(rng: np.random.Generator, training: bool) -> Backdrop:
    if rng.random() < 0.5:
        indices = photos.TRAINING if training else photos.EVALUATION
        share = float(rng.uniform(0.6, 1.0))
        left, top = (float(v) for v in rng.uniform(0, 1 - share, 2))
        window = (left, top, share, share) if rng.random() < 0.5 else (left + share, top, -share, share)  # mirrored
        return Backdrop("photo", photo=int(rng.choice(indices)), window=window)
    kind = str(
        rng.choice(["plain", "gradient", "radial", "clouds", "stripes", "checks"], p=[0.2, 0.2, 0.2, 0.2, 0.1, 0.1])
    )
    first = tuple(float(c) for c in rng.uniform(0.15, 0.85, 3))
    second = tuple(float(np.clip(c + d, 0.05, 0.95)) for c, d in zip(first, rng.uniform(-0.35, 0.35, 3), strict=True))
    return Backdrop(
        kind,
        first,
        second,
        angle=float(rng.uniform(0, 6.283)),
        period=1 / int(rng.integers(4, 7)),
        seed=int(rng.integers(2**31)),
    )


def _asked_background(rng: np.random.Generator, taken: Sequence[str]) -> tuple[Backdrop, str]:
    """A background that the prompt can name, in colours that no object has, so that all objects stay visible."""
    kind = str(rng.choice(list(BACKGROUNDS)))
    c1, c2 = (str(c) for c in rng.choice([c for c in COLOURS if c not in taken], 2, replace=False))
    background = Backdrop(kind, rgb(c1), rgb(c2), angle=0.0, period=0.25)
    return background, BACKGROUNDS[kind].format(c1=c1, c2=c2)


def _other(rng: np.random.Generator, names, current: str) -> str:
    return str(rng.choice([n for n in names if n != current]))


def rgb(colour: str) -> tuple[float, float, float]:
    """A colour's name as numbers from 0 to 1."""
    return tuple(c / 255 for c in COLOURS[colour])


def _size(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 16 or width < 16:
        raise ValueError(f"size: expected at least 16 px a side, got {height} x {width}")
    return height, width


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy())
