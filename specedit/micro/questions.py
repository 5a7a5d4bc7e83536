"""What training asks the editor beside its pictures, so that it finds out sooner what the words mean.

Few tokens change in an edit, and the flow loss speaks of colours, shapes and places only through what is drawn there.
These linear readings of hidden states ask directly. Only training has them; the shipped editor does not.
"""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .render import Thing, backdrop, coverage
from .scenes import Scene, rgb
from .vocabulary import BACKGROUNDS, COLOURS, KINDS, PLACES, SHAPES

_COLOURS, _PLACES, _BACKGROUNDS = list(COLOURS), list(PLACES), list(BACKGROUNDS)
# What a prompt says: its kind, the object that it means, what that becomes, where; the new background and its first and
# second colour, whose order nothing but the words' own tells. 0: not said.
SAID = (
    len(KINDS),
    *(n + 1 for n in (len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES), len(PLACES))),
    *(n + 1 for n in (len(BACKGROUNDS), len(COLOURS), len(COLOURS))),
)
SEEN = (len(COLOURS) + 1, len(SHAPES) + 1)  # colour and shape of the object that a token shows, 0: background


def said(scene: Scene) -> list[int]:
    """The answers for one prompt, in the order of `SAID`."""
    kind = KINDS.index(scene.kind)
    thing = {"add": scene.after}.get(scene.kind, scene.before)[0]
    named = f"{thing.colour} {thing.shape}" in scene.prompt
    colour, shape = 1 + _COLOURS.index(thing.colour), 1 + SHAPES.index(thing.shape)
    if scene.kind == "background":
        new = scene.new_background
        one, two = (1 + next(i for i, c in enumerate(COLOURS) if rgb(c) == asked) for asked in (new.first, new.second))
        return [kind, 0, 0, 0, 0, 0, 1 + _BACKGROUNDS.index(new.kind), one, 0 if new.kind == "plain" else two]
    if scene.place is None:
        return [kind, *[0] * 8]
    if scene.kind == "add":
        place = next(i for i, p in enumerate(_PLACES) if PLACES[p] == scene.place)
        return [kind, 0, 0, colour, shape, 1 + place, 0, 0, 0]
    new_colour = 1 + _COLOURS.index(scene.after[0].colour) if scene.kind == "recolor" else 0
    new_shape = 1 + SHAPES.index(scene.after[0].shape) if scene.kind == "shape" else 0
    return [kind, colour if named else 0, shape, new_colour, new_shape, 0, 0, 0, 0]


def seen(scene: Scene, grid: tuple[int, int]) -> Tensor:
    """Colour and shape (N, 2) of the source's object at each token's centre, 0 where there is none."""
    height, width = grid
    short = min(grid)
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    out = torch.zeros(height, width, 2, dtype=torch.long)
    for thing in scene.before:
        # At least half a token wide, so that the token that holds a small object's centre counts.
        reach = max(0.8 * thing.r * short, 0.5)
        near = (rows - thing.y * height) ** 2 + (columns - thing.x * width) ** 2 <= reach**2
        out[near] = torch.tensor([1 + _COLOURS.index(thing.colour), 1 + SHAPES.index(thing.shape)])
    return out.flatten(0, 1)


FINE = 4  # an outline is asked about in FINE x FINE parts of a token


def outline(scene: Scene, grid: tuple[int, int]) -> Tensor:
    """How much of each part of each token (N, FINE^2) the edited object covers in the target, 0 where there is none;
    of a new background, how much of it has the second colour."""
    height, width = (side * FINE for side in grid)
    if scene.kind in ("remove", "greyscale"):
        parts = torch.zeros(height, width)
    elif scene.kind == "background":
        mix = replace(scene.new_background, first=(0.0,) * 3, second=(1.0,) * 3)
        parts = backdrop([mix], height, width, torch.empty(0))[0, 0]
    else:
        (parts,) = coverage(scene.after[:1], height, width)
    return rearrange(parts, "(h p) (w q) -> (h w) (p q)", p=FINE, q=FINE)


def edited_object(scene: Scene) -> tuple[Thing, ...]:
    """The one object that the edit is about, as the target has it or had it; none where the whole picture changes."""
    if scene.place is None:
        return ()
    return (scene.after if scene.kind == "add" else scene.before)[:1]


REACH = 1.2  # radii from an object's middle within which a token is asked where that is
RADIUS, SPREAD = 0.125, 0.025  # of the scenes' objects: the middle of their range, and how far it goes


def offsets(things: Sequence[Thing], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where each token's centre lies as the nearest object sees it, (N, 3): right and down of its middle in radii, and
    its radius, from -1 to 1; and which tokens are within `REACH` of one, (N,) float32."""
    height, width = grid
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    out, best = torch.zeros(height, width, 3), torch.full((height, width), REACH)
    for thing in things:
        r = thing.r * min(grid)
        right, down = (columns - thing.x * width) / r, (rows - thing.y * height) / r
        distance = torch.hypot(right, down)
        near, best = distance < best, torch.minimum(distance, best)
        seen_so = torch.stack([right, down, torch.full_like(right, (thing.r - RADIUS) / SPREAD)], -1)
        out = torch.where(near[..., None], seen_so, out)
    return out.flatten(0, 1), (best < REACH).float().flatten()


WAVES = 6  # the fourth changes sign where stripes and checks do, the sixth peaks on the lines of the board of objects


def where(grid: tuple[int, int]) -> Tensor:
    """Where in the picture each token (N, 2 * WAVES) is: cos(pi k x), k = 1..WAVES, of its centre's row and column x,
    both from 0 to 1."""
    axes = [(torch.arange(n) + 0.5) / n for n in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    return (math.pi * places[..., None] * torch.arange(1, WAVES + 1)).cos().flatten(2).flatten(0, 1)


def cross_entropy(logits: Tensor, labels: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Mean over the questions; logits (..., sum(sizes)), labels (..., len(sizes))."""
    parts = logits.float().split(sizes, -1)
    return sum(F.cross_entropy(p.flatten(0, -2), labels[..., i].flatten()) for i, p in enumerate(parts)) / len(sizes)


def missed(offsets: Tensor, answers: Tensor, near: Tensor) -> Tensor:
    """Mean squared error of offsets (B, N, 3) over the tokens that are `near` (B, N), 0 where none is."""
    error = (offsets.float() - answers).square().mean(-1)
    return (error * near).sum() / near.sum().clamp_min(1)


class Questions(nn.Module):
    """Linear readings of three blocks' image tokens.

    After the early block every token must know where it is and what the prompt says, and a reference token what it
    shows and where the middle of that object is; after the middle one a reference token must know whether it is to
    change, and a target token where the middle of the edited object is; after the late one a target token must know
    which of its parts the edited object, or a new background's second colour, is to cover.
    """

    def __init__(self, transformer: nn.Module, blocks: tuple[nn.Module, nn.Module, nn.Module]):
        super().__init__()
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in blocks])
        self.prompt, self.thing = nn.Linear(width, sum(SAID)), nn.Linear(width, sum(SEEN))
        self.place, self.shown, self.aim = nn.Linear(width, 2 * WAVES), nn.Linear(width, 3), nn.Linear(width, 3)
        self.change, self.cover = nn.Linear(width, 1), nn.Linear(width, FINE**2)
        self.hidden: dict[int, Tensor] = {}
        for i, block in enumerate(blocks):
            block.register_forward_hook(lambda _block, _inputs, output, i=i: self._see(i, output))

    def _see(self, i: int, output: tuple[Tensor, Tensor]) -> None:
        if torch.is_grad_enabled():  # sampling leaves nothing behind
            self.hidden[i] = output[1]

    def early(self, tokens: int, answers: "Answers", told: Tensor | None = None) -> dict[str, Tensor]:
        """Mean squared errors `where` and `shown` and cross-entropies `said` and `seen` of what the last forward left
        after the early block.

        `tokens`: how many target tokens precede the reference tokens. `told` (B,) bool: the samples that had their
        prompt, at least one; None: all.
        """
        states = self.norms[0](self.hidden.pop(0))
        prompts, readers = answers.said[:, None].expand(-1, states.shape[1], -1), states
        if told is not None:
            prompts, readers = prompts[told], states[told]
        error = self.place(states).float() - answers.where.repeat(states.shape[1] // tokens, 1)
        return {
            "where": error.square().mean(),
            "said": cross_entropy(self.prompt(readers), prompts, SAID),
            "seen": cross_entropy(self.thing(states[:, tokens:]), answers.seen, SEEN),
            "shown": missed(self.shown(states[:, tokens:]), *answers.shown),
        }

    def losses(
        self, tokens: int, answers: "Answers", noisy: Tensor, weight: Tensor, told: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Those of `early`, and over the samples in `noisy` `find`, `aim` and, target tokens weighed by `weight`
        (B, N), `cover`.

        `noisy` (B,): 1 or 0; a target that shows through its noise would give them away.
        """
        losses = self.early(tokens, answers, told)
        middle, late = (norm(self.hidden.pop(i)) for i, norm in enumerate(self.norms) if i)
        if told is not None:
            noisy = noisy * told
        change = self.change(middle[:, tokens:]).squeeze(-1).float()
        find = F.binary_cross_entropy_with_logits(change, answers.edited, reduction="none").mean(-1)
        cover = F.binary_cross_entropy_with_logits(
            self.cover(late[:, :tokens]).float(), answers.covered, reduction="none"
        ).mean(-1)
        cover = (cover * weight).sum(-1) / weight.sum(-1)
        offset, near = answers.aimed
        losses["aim"] = missed(self.aim(middle[:, :tokens]), offset, near * noisy[:, None])
        losses["find"] = (find * noisy).sum() / noisy.sum().clamp_min(1)
        losses["cover"] = (cover * noisy).sum() / noisy.sum().clamp_min(1)
        return losses


class Answers:
    """Labels of a batch: `said` (B, 9), `seen` (B, N, 2) int64, `where` (N, 2 * WAVES), `edited` (B, N), `covered`
    (B, N, FINE^2) float32; `offsets`, stacked to (B, N, 3) and (B, N), of the objects `shown` and of the edited one,
    `aimed`."""

    def __init__(self, scenes: Sequence[Scene], grid: tuple[int, int], edited: Tensor):
        self.said = torch.tensor([said(s) for s in scenes], device=edited.device)
        self.seen = torch.stack([seen(s, grid) for s in scenes]).to(edited.device)
        self.covered = torch.stack([outline(s, grid) for s in scenes]).to(edited.device)
        self.where = where(grid).to(edited.device)
        self.shown, self.aimed = (
            tuple(torch.stack(part).to(edited.device) for part in zip(*(offsets(of(s), grid) for s in scenes)))
            for of in (lambda s: s.before, edited_object)
        )
        self.edited = edited

    def part(self, at: Tensor) -> "Answers":
        """Of the tokens `at` (n,) only."""
        out = copy(self)
        out.where, out.edited = self.where[at], self.edited[:, at]
        out.seen, out.covered = self.seen[:, at], self.covered[:, at]
        out.shown, out.aimed = (tuple(part[:, at] for part in both) for both in (self.shown, self.aimed))
        return out
