"""Auxiliary linear probes, trained jointly with the flow-matching loss.

Few tokens change in an edit, and the flow loss depends on colours, shapes and places only through what is drawn there.
The probes read them from hidden states directly, which shortens training. They are not part of the saved editor.
"""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from specedit.micro.render import Thing, backdrop, coverage
from specedit.micro.scenes import Scene, rgb
from specedit.micro.vocabulary import ALL_KINDS, BACKGROUNDS, COLOURS, MATERIALS, PLACES, SHAPES

_COLOURS, _PLACES, _BACKGROUNDS = list(COLOURS), list(PLACES), list(BACKGROUNDS)
# Classes of each label of a prompt: the kind; the object's colour and shape; its new colour and shape; its place; the
# new background with its first and second colour, which only word order tells apart; the material. 0: not mentioned.
PROMPT_CLASSES = (
    len(ALL_KINDS),
    *(n + 1 for n in (len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES), len(PLACES))),
    *(n + 1 for n in (len(BACKGROUNDS), len(COLOURS), len(COLOURS), len(MATERIALS))),
)
TOKEN_CLASSES = (len(COLOURS) + 1, len(SHAPES) + 1)  # colour and shape of the object in a token, 0: background


def prompt_labels(scene: Scene) -> list[int]:
    """What the scene's prompt mentions: one class index for each entry of `PROMPT_CLASSES`."""
    kind = ALL_KINDS.index(scene.kind)
    material = 0 if scene.material is None else 1 + MATERIALS.index(scene.material)
    thing = {"add": scene.after}.get(scene.kind, scene.before)[0]
    named = f"{thing.colour} {thing.shape}" in scene.prompt
    colour, shape = 1 + _COLOURS.index(thing.colour), 1 + SHAPES.index(thing.shape)
    if scene.kind == "background":
        new = scene.new_background
        one, two = (1 + next(i for i, c in enumerate(COLOURS) if rgb(c) == part) for part in (new.first, new.second))
        return [kind, 0, 0, 0, 0, 0, 1 + _BACKGROUNDS.index(new.kind), one, 0 if new.kind == "plain" else two, 0]
    if scene.place is None:
        return [kind, *[0] * 8, material]
    if scene.kind == "add":
        place = next(i for i, p in enumerate(_PLACES) if PLACES[p] == scene.place)
        return [kind, 0, 0, colour, shape, 1 + place, 0, 0, 0, 0]
    new_colour = 1 + _COLOURS.index(scene.after[0].colour) if scene.kind == "recolor" else 0
    new_shape = 1 + SHAPES.index(scene.after[0].shape) if scene.kind == "shape" else 0
    return [kind, colour if named else 0, shape, new_colour, new_shape, 0, 0, 0, 0, material]


def token_labels(scene: Scene, grid: tuple[int, int]) -> Tensor:
    """Colour and shape (N, 2) int64 of the source's object at each token's centre, 0 where there is none."""
    height, width = grid
    short = min(grid)
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    out = torch.zeros(height, width, 2, dtype=torch.long)
    for thing in scene.before:
        # At least half a token, so that the token with a small object's centre counts.
        reach = max(0.8 * thing.r * short, 0.5)
        near = (rows - thing.y * height) ** 2 + (columns - thing.x * width) ** 2 <= reach**2
        out[near] = torch.tensor([1 + _COLOURS.index(thing.colour), 1 + SHAPES.index(thing.shape)])
    return out.flatten(0, 1)


FINE = 4  # coverage is predicted for FINE x FINE parts of a token


def coverage_labels(scene: Scene, grid: tuple[int, int]) -> Tensor:
    """Share of each part of each token (N, FINE^2) that the edited object covers in the target.

    For a new background in two colours it is the share of the second; where no object is drawn 0.
    """
    height, width = (side * FINE for side in grid)
    if scene.kind in ("remove", "greyscale") or (scene.kind == "texture" and scene.place is None):
        parts = torch.zeros(height, width)
    elif scene.kind == "background":
        mix = replace(scene.new_background, first=(0.0,) * 3, second=(1.0,) * 3)
        parts = backdrop([mix], height, width, torch.empty(0))[0, 0]
    else:
        (parts,) = coverage(scene.after[:1], height, width)
    return rearrange(parts, "(h p) (w q) -> (h w) (p q)", p=FINE, q=FINE)


def edited_object(scene: Scene) -> tuple[Thing, ...]:
    """The object that is edited, from the target if it was added and else from the source; none for global edits."""
    if scene.place is None:
        return ()
    return (scene.after if scene.kind == "add" else scene.before)[:1]


REACH = 1.2  # tokens within this many radii of an object's centre predict where the centre is
RADIUS, SPREAD = 0.125, 0.025  # centre and half-width of the range of the objects' radii


def centre_offsets(things: Sequence[Thing], grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where each token's centre lies relative to the nearest object.

    Returns:
        (N, 3): offset to the right of and below the object's centre, in radii, and the radius scaled to -1..1.
        (N,) float32: 1 for the tokens within `REACH` of an object, else 0.
    """
    height, width = grid
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    out, best = torch.zeros(height, width, 3), torch.full((height, width), REACH)
    for thing in things:
        r = thing.r * min(grid)
        right, down = (columns - thing.x * width) / r, (rows - thing.y * height) / r
        distance = torch.hypot(right, down)
        near, best = distance < best, torch.minimum(distance, best)
        offset = torch.stack([right, down, torch.full_like(right, (thing.r - RADIUS) / SPREAD)], -1)
        out = torch.where(near[..., None], offset, out)
    return out.flatten(0, 1), (best < REACH).float().flatten()


WAVES = 6  # the fourth changes sign where stripes and checks do, the sixth peaks on the lines of the board of objects


def position_features(grid: tuple[int, int]) -> Tensor:
    """Position of each token as cosines (N, 2 * WAVES): cos(pi k x), k = 1..WAVES, of its row and column x in 0..1."""
    axes = [(torch.arange(n) + 0.5) / n for n in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    return (math.pi * places[..., None] * torch.arange(1, WAVES + 1)).cos().flatten(2).flatten(0, 1)


def cross_entropy(logits: Tensor, labels: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Mean cross-entropy of several classifications: logits (..., sum(sizes)), labels (..., len(sizes))."""
    parts = logits.float().split(sizes, -1)
    return sum(F.cross_entropy(p.flatten(0, -2), labels[..., i].flatten()) for i, p in enumerate(parts)) / len(sizes)


def masked_mse(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of (B, N, D) over the tokens of `mask` (B, N), 0 if it is empty."""
    error = (predicted.float() - target).square().mean(-1)
    return (error * mask).sum() / mask.sum().clamp_min(1)


class Probes(nn.Module):
    """Linear probes of three blocks' image tokens.

    Early block: every token predicts its position and the prompt; a reference token also the object that it shows and
    the offset to that object's centre. Middle block: a reference token predicts whether it will be edited, a target
    token the offset to the edited object's centre. Late block: a target token predicts how much of each of its parts
    the edited object, or a new background's second colour, covers.

    Attributes keep the names that state dicts of saved runs have.
    """

    def __init__(self, transformer: nn.Module, blocks: tuple[nn.Module, nn.Module, nn.Module]):
        super().__init__()
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in blocks])
        self.prompt, self.thing = nn.Linear(width, sum(PROMPT_CLASSES)), nn.Linear(width, sum(TOKEN_CLASSES))
        self.place, self.shown, self.aim = nn.Linear(width, 2 * WAVES), nn.Linear(width, 3), nn.Linear(width, 3)
        self.change, self.cover = nn.Linear(width, 1), nn.Linear(width, FINE**2)
        self.hidden: dict[int, Tensor] = {}
        for i, block in enumerate(blocks):
            block.register_forward_hook(lambda _block, _inputs, output, i=i: self._record(i, output))

    def _record(self, i: int, output: tuple[Tensor, Tensor]) -> None:
        if torch.is_grad_enabled():  # not while sampling
            self.hidden[i] = output[1]

    def early(self, tokens: int, labels: "Labels", has_prompt: Tensor | None = None) -> dict[str, Tensor]:
        """Losses of the early block's probes on the last forward: `position`, `prompt`, `token`, `reference_offset`.

        Args:
            tokens: number of target tokens; the reference tokens follow them.
            has_prompt: (B,) bool, the samples whose prompt was not dropped, at least one; None: all.
        """
        states = self.norms[0](self.hidden.pop(0))
        prompts, readers = labels.prompt[:, None].expand(-1, states.shape[1], -1), states
        if has_prompt is not None:
            prompts, readers = prompts[has_prompt], states[has_prompt]
        error = self.place(states).float() - labels.position.repeat(states.shape[1] // tokens, 1)
        return {
            "position": error.square().mean(),
            "prompt": cross_entropy(self.prompt(readers), prompts, PROMPT_CLASSES),
            "token": cross_entropy(self.thing(states[:, tokens:]), labels.token, TOKEN_CLASSES),
            "reference_offset": masked_mse(self.shown(states[:, tokens:]), *labels.reference_offset),
        }

    def losses(
        self, tokens: int, labels: "Labels", noisy: Tensor, weight: Tensor, has_prompt: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The losses of `early`, and `edited`, `edit_offset` and `coverage` over the samples in `noisy`.

        Args:
            noisy: (B,) 1 or 0. At low noise the target itself would give these labels away.
            weight: (B, N), the target tokens' weights in `coverage`.
        """
        losses = self.early(tokens, labels, has_prompt)
        middle, late = (norm(self.hidden.pop(i)) for i, norm in enumerate(self.norms) if i)
        if has_prompt is not None:
            noisy = noisy * has_prompt
        change = self.change(middle[:, tokens:]).squeeze(-1).float()
        edited = F.binary_cross_entropy_with_logits(change, labels.edited, reduction="none").mean(-1)
        cover = F.binary_cross_entropy_with_logits(
            self.cover(late[:, :tokens]).float(), labels.coverage, reduction="none"
        ).mean(-1)
        cover = (cover * weight).sum(-1) / weight.sum(-1)
        offset, near = labels.edit_offset
        losses["edit_offset"] = masked_mse(self.aim(middle[:, :tokens]), offset, near * noisy[:, None])
        losses["edited"] = (edited * noisy).sum() / noisy.sum().clamp_min(1)
        losses["coverage"] = (cover * noisy).sum() / noisy.sum().clamp_min(1)
        return losses


class Labels:
    """The probes' targets for a batch of scenes.

    Attributes:
        prompt: (B, 10) int64, `prompt_labels`.
        token: (B, N, 2) int64, `token_labels`.
        position: (N, 2 * WAVES) float32, `position_features`.
        edited: (B, N) float32, 1 where the edit changes a token.
        coverage: (B, N, FINE^2) float32, `coverage_labels`.
        reference_offset, edit_offset: (B, N, 3) and (B, N), `centre_offsets` of the source's objects and of the edited
            one.
        textured: (B,) bool, whether it is of kind "texture".
    """

    def __init__(self, scenes: Sequence[Scene], grid: tuple[int, int], edited: Tensor):
        self.prompt = torch.tensor([prompt_labels(s) for s in scenes], device=edited.device)
        self.token = torch.stack([token_labels(s, grid) for s in scenes]).to(edited.device)
        self.coverage = torch.stack([coverage_labels(s, grid) for s in scenes]).to(edited.device)
        self.position = position_features(grid).to(edited.device)
        self.reference_offset, self.edit_offset = (
            tuple(torch.stack(part).to(edited.device) for part in zip(*(centre_offsets(t, grid) for t in things)))
            for things in ([s.before for s in scenes], [edited_object(s) for s in scenes])
        )
        self.edited = edited
        self.textured = torch.tensor([s.kind == "texture" for s in scenes], device=edited.device)

    def select(self, at: Tensor) -> "Labels":
        """The labels of the tokens `at` (n,) only."""
        out = copy(self)
        out.position, out.edited = self.position[at], self.edited[:, at]
        out.token, out.coverage = self.token[:, at], self.coverage[:, at]
        out.reference_offset, out.edit_offset = (
            tuple(part[:, at] for part in both) for both in (self.reference_offset, self.edit_offset)
        )
        return out
