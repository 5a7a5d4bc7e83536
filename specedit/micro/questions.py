"""What training asks the editor beside its pictures, so that it finds out sooner what the words mean.

Few tokens change in an edit, and the flow loss speaks of colours, shapes and places only through what is drawn there.
These linear readings of hidden states ask directly. Only training has them; the shipped editor does not.
"""

import math
from collections.abc import Sequence
from copy import copy

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .render import coverage
from .scenes import Scene
from .vocabulary import COLOURS, KINDS, PLACES, SHAPES

_COLOURS, _PLACES = list(COLOURS), list(PLACES)
# What a prompt says: its kind, the object that it means, what that becomes, where. 0: not said.
SAID = (len(KINDS), *(n + 1 for n in (len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES), len(PLACES))))
SEEN = (len(COLOURS) + 1, len(SHAPES) + 1)  # colour and shape of the object that a token shows, 0: background


def said(scene: Scene) -> list[int]:
    """The answers for one prompt, in the order of `SAID`."""
    kind = KINDS.index(scene.kind)
    thing = {"add": scene.after}.get(scene.kind, scene.before)[0]
    named = f"{thing.colour} {thing.shape}" in scene.prompt
    colour, shape = 1 + _COLOURS.index(thing.colour), 1 + SHAPES.index(thing.shape)
    if scene.place is None:
        return [kind, 0, 0, 0, 0, 0]
    if scene.kind == "add":
        place = next(i for i, p in enumerate(_PLACES) if PLACES[p] == scene.place)
        return [kind, 0, 0, colour, shape, 1 + place]
    new_colour = 1 + _COLOURS.index(scene.after[0].colour) if scene.kind == "recolor" else 0
    new_shape = 1 + SHAPES.index(scene.after[0].shape) if scene.kind == "shape" else 0
    return [kind, colour if named else 0, shape, new_colour, new_shape, 0]


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
    """How much of each part of each token (N, FINE^2) the edited object covers in the target; 0 where there is none."""
    height, width = grid
    if scene.place is None or scene.kind == "remove":
        return torch.zeros(height * width, FINE**2)
    (parts,) = coverage(scene.after[:1], height * FINE, width * FINE)
    return rearrange(parts, "(h p) (w q) -> (h w) (p q)", p=FINE, q=FINE)


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


class Questions(nn.Module):
    """Linear readings of three blocks' image tokens.

    After the early block every token must know where it is and what the prompt says, and a reference token what it
    shows; after the middle one a reference token must know whether it is to change; after the late one a target token
    must know which of its parts the edited object is to cover.
    """

    def __init__(self, transformer: nn.Module, blocks: tuple[nn.Module, nn.Module, nn.Module]):
        super().__init__()
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in blocks])
        self.prompt, self.thing = nn.Linear(width, sum(SAID)), nn.Linear(width, sum(SEEN))
        self.place = nn.Linear(width, 2 * WAVES)
        self.change, self.cover = nn.Linear(width, 1), nn.Linear(width, FINE**2)
        self.hidden: dict[int, Tensor] = {}
        for i, block in enumerate(blocks):
            block.register_forward_hook(lambda _block, _inputs, output, i=i: self._see(i, output))

    def _see(self, i: int, output: tuple[Tensor, Tensor]) -> None:
        if torch.is_grad_enabled():  # sampling leaves nothing behind
            self.hidden[i] = output[1]

    def early(self, tokens: int, answers: "Answers", told: Tensor | None = None) -> dict[str, Tensor]:
        """Mean squared error `where` and cross-entropies `said` and `seen` of what the last forward left after the
        early block.

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
        }

    def losses(
        self, tokens: int, answers: "Answers", noisy: Tensor, weight: Tensor, told: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Those of `early`, and over the samples in `noisy` `find` and, target tokens weighed by `weight` (B, N),
        `cover`.

        `noisy` (B,): 1 or 0; a target that shows through its noise would give `find` and `cover` away.
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
        losses["find"] = (find * noisy).sum() / noisy.sum().clamp_min(1)
        losses["cover"] = (cover * noisy).sum() / noisy.sum().clamp_min(1)
        return losses


class Answers:
    """Labels of a batch: `said` (B, 6), `seen` (B, N, 2) int64, `where` (N, 2 * WAVES), `edited` (B, N), `covered`
    (B, N, FINE^2) float32."""

    def __init__(self, scenes: Sequence[Scene], grid: tuple[int, int], edited: Tensor):
        self.said = torch.tensor([said(s) for s in scenes], device=edited.device)
        self.seen = torch.stack([seen(s, grid) for s in scenes]).to(edited.device)
        self.covered = torch.stack([outline(s, grid) for s in scenes]).to(edited.device)
        self.where = where(grid).to(edited.device)
        self.edited = edited

    def part(self, at: Tensor) -> "Answers":
        """Of the tokens `at` (n,) only."""
        out = copy(self)
        out.where, out.edited = self.where[at], self.edited[:, at]
        out.seen, out.covered = self.seen[:, at], self.covered[:, at]
        return out
