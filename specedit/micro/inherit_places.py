"""Lets a Qwen editor that takes over a Kontext editor keep that editor's landmarks, and what words say of places.

In FLUX every text token stands at the origin, the picture's first token. In Qwen they stand in a row beyond the
picture's last one: of h x h picture tokens, token j of the text is at h/2 + j on all three axes, and the picture begins
at -h/2. So a query or key of the text meets the picture's as it did in FLUX once it is turned back by

    theta (h/2 + j) on the image's axis,    theta (h + j) on the rows' and the columns',

theta being the rotary frequency of each of its pairs. Here h is that of the largest pictures of training; what the same
landmarks say of smaller ones is learned. The landmarks themselves are the last tokens of the prompt's template, which
are the same whatever it asks for: the tokenizer puts as many tokens in front, and the pipeline, which leaves out a
fixed number, leaves out those instead.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from tokenizers import processors
from torch import Tensor

from . import family_kontext, scenes
from .family import of
from .landmarks import LANDMARKS, fit, which
from .train_editor import encode, noised
from .training import seeds

LEAD = "<|vision_pad|>"  # a token of Qwen's that no prompt has
SIDE = 512  # px
SAMPLES = 256  # prompts that the text's projections are fitted to
SEEN = 16  # of them with a picture, of which they see
PART = 256  # tokens
DAMPING = 1e-5  # tokens are not noisy, but those of the template are much like words


def take_over_places(pipe: Any, teacher: Any) -> None:
    """Give a QwenImageEditPipeline that took over `teacher`'s transformer also its landmarks."""
    pipe.to("cpu")  # little work; whoever trains brings it to a device again
    teacher.to("cpu")
    lead(pipe)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        _say(pipe, teacher)
        _turn(pipe)


def lead(pipe: Any) -> None:
    """Let every text begin with `LANDMARKS` tokens more; once is enough."""
    tokenizer = pipe.processor.tokenizer
    if len(tokenizer("").input_ids) == LANDMARKS:
        return
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*[LEAD] * LANDMARKS, "$A"]), special_tokens=[(LEAD, tokenizer.convert_tokens_to_ids(LEAD))]
    )
    pipe.tokenizer = tokenizer


def _say(pipe: Any, teacher: Any) -> None:
    """Fit `txt_in`: the first `LANDMARKS` tokens become to the blocks what the teacher's landmarks are to its own, the
    words stay what they are."""
    prompts = [scenes.describe(seed).prompt for seed in seeds(1 << 41, SAMPLES)]
    marks = _landmarks(teacher, prompts)
    model = pipe.transformer
    embeds, mask = of(pipe).text(pipe, prompts, None, "cpu")
    states = model.txt_norm(embeds)
    wanted = model.txt_in(states)
    wanted[:, :LANDMARKS] = marks
    model.txt_in.weight[:], model.txt_in.bias[:] = fit(states[mask], wanted[mask], DAMPING)


def _landmarks(teacher: Any, prompts: list[str]) -> Tensor:
    """(LANDMARKS, width) float32: what the blocks of a Kontext editor are given for its landmarks."""
    words = family_kontext.text(teacher, prompts, None, "cpu")[0]
    marks = which(teacher.tokenizer_2, prompts, words.shape[1])
    states = teacher.transformer.context_embedder(words)
    return torch.stack([states[marks == i].mean(0) for i in range(LANDMARKS)])


def _turn(pipe: Any) -> None:
    """Fit the projections of the text's queries and keys, block after block, to what they were, turned back."""
    model, family = pipe.transformer, of(pipe)
    tasks = [scenes.describe(seed) for seed in seeds(1 << 41, SEEN)]
    batch = encode(pipe, tasks, (SIDE, SIDE), "cpu")
    batch = batch.part(torch.randperm(batch.target.shape[1])[:PART].sort().values)
    sigma = torch.rand(SEEN)
    x, _ = noised(batch.target, sigma)
    features = family.text(pipe, batch.prompts, batch.seen, "cpu")
    angles = back(features[1].shape[1], batch.grid[0], model.pos_embed.axes_dim, model.pos_embed.theta)
    for block in model.transformer_blocks:
        attn, states = block.attn, []
        hook = attn.add_k_proj.register_forward_pre_hook(lambda _module, inputs, to=states: to.append(inputs[0]))
        family.velocity(pipe, x, batch.source, batch.grid, sigma, features, batch.at)
        hook.remove()
        for linear, norm in ((attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k)):
            now = norm(rearrange(linear(states[0]), "b n (h d) -> b n h d", h=attn.heads))
            wanted = rearrange(turned(now, angles) / norm.weight, "b n h d -> b n (h d)")
            linear.weight[:], linear.bias[:] = fit(states[0][features[1]], wanted[features[1]], DAMPING)


def back(tokens: int, side: int, axes: list[int], theta: float) -> Tensor:
    """Angles (tokens, sum(axes) / 2) by which each token's pairs of channels are turned back, for `side` x `side`."""
    out = []
    for axis, dim in enumerate(axes):
        place = torch.arange(tokens) + side // 2 + (side - side // 2 if axis else 0)
        out.append(-torch.outer(place.float(), theta ** (-torch.arange(0, dim, 2) / dim)))
    return torch.cat(out, 1)


def turned(vectors: Tensor, angles: Tensor) -> Tensor:
    """Neighbouring channels of `vectors` (B, n, heads, d) as complex numbers, turned by `angles` (n, d / 2)."""
    pairs = torch.view_as_complex(rearrange(vectors.float(), "... (d two) -> ... d two", two=2).contiguous())
    angles = repeat(angles, "n d -> n 1 d")
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
