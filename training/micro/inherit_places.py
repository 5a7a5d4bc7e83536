"""Fits a Qwen editor's text projections so that the landmarks and words of a Kontext editor keep their positions.

In FLUX every text token is at the origin, the image's first token. In Qwen text tokens follow on the diagonal: for
h x h image tokens, text token j is at h/2 + j on all three axes, and the image begins at -h/2. So a text query or key
attends as in FLUX once it is rotated back by

    theta (h/2 + j) on the image axis,    theta (h + j) on the row and column axes,

theta being the rotary frequency of each pair of channels. h is that of the largest training images; the landmarks'
meaning in smaller ones is learned. The landmarks are the last tokens of the prompt template, which are the same for
every prompt: the tokenizer prepends as many tokens, and the pipeline, which drops a fixed number, drops those instead.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from tokenizers import processors
from torch import Tensor

from specedit.micro import scenes

from . import family_kontext
from .families import family_of
from .first_blocks import only_first
from .landmarks import LANDMARKS, landmark_index, ridge_fit
from .loop import seeds
from .train_editor import encode, noised

LEAD_TOKEN = "<|vision_pad|>"  # a token of Qwen's that no prompt has
SIDE = 512  # px
SAMPLES = 256  # prompts that `txt_in` is fitted to
WITH_IMAGE = 16  # tasks with images that queries and keys are fitted to
IMAGE_TOKENS = 256  # of each of those images
DAMPING = 1e-5  # small: states have no noise, and the template's resemble those of words


def inherit_landmarks(pipe: Any, teacher: Any) -> None:
    """Give a QwenImageEditPipeline that inherited `teacher`'s transformer its landmarks too, in place."""
    pipe.to("cpu")  # little work; training moves it to its device again
    teacher.to("cpu")
    prepend_tokens(pipe)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        _fit_landmark_tokens(pipe, teacher)
        _fit_rotations(pipe)


def prepend_tokens(pipe: Any) -> None:
    """Make the tokenizer prepend `LANDMARKS` tokens to every text; a second call changes nothing."""
    tokenizer = pipe.processor.tokenizer
    if len(tokenizer("").input_ids) == LANDMARKS:
        return
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*[LEAD_TOKEN] * LANDMARKS, "$A"]),
        special_tokens=[(LEAD_TOKEN, tokenizer.convert_tokens_to_ids(LEAD_TOKEN))],
    )
    pipe.tokenizer = tokenizer


def _fit_landmark_tokens(pipe: Any, teacher: Any) -> None:
    """Fit `txt_in`, so that the first `LANDMARKS` tokens equal the teacher's landmarks and the words stay the same."""
    prompts = [scenes.describe(seed).prompt for seed in seeds(1 << 41, SAMPLES)]
    marks = _landmarks(teacher, prompts)
    model = pipe.transformer
    embeds, mask = family_of(pipe).text(pipe, prompts, None, "cpu")
    states = model.txt_norm(embeds)
    wanted = model.txt_in(states)
    wanted[:, :LANDMARKS] = marks
    model.txt_in.weight[:], model.txt_in.bias[:] = ridge_fit(states[mask], wanted[mask], DAMPING)


def _landmarks(teacher: Any, prompts: list[str]) -> Tensor:
    """What the blocks of a Kontext editor get for its landmarks: (LANDMARKS, width) float32."""
    words = family_kontext.text(teacher, prompts, None, "cpu")[0]
    marks = landmark_index(teacher.tokenizer_2, prompts, words.shape[1])
    states = teacher.transformer.context_embedder(words)
    return torch.stack([states[marks == i].mean(0) for i in range(LANDMARKS)])


def _fit_rotations(pipe: Any) -> None:
    """Fit each block's text query and key projections to their old outputs, rotated back."""
    model, family = pipe.transformer, family_of(pipe)
    tasks = [scenes.describe(seed) for seed in seeds(1 << 41, WITH_IMAGE)]
    batch = encode(pipe, tasks, (SIDE, SIDE), "cpu")
    batch = batch.select(torch.randperm(batch.target.shape[1])[:IMAGE_TOKENS].sort().values)
    sigma = torch.rand(WITH_IMAGE)
    x, _ = noised(batch.target, sigma)
    features = family.text(pipe, batch.prompts, batch.vision, "cpu")
    angles = inverse_angles(features[1].shape[1], batch.grid[0], model.pos_embed.axes_dim, model.pos_embed.theta)
    for depth, block in enumerate(model.transformer_blocks, start=1):
        attn, states = block.attn, []
        hook = attn.add_k_proj.register_forward_pre_hook(lambda _module, inputs, to=states: to.append(inputs[0]))
        with only_first(model, depth):
            family.velocity(pipe, x, batch.source, batch.grid, sigma, features, batch.at)
        hook.remove()
        for linear, norm in ((attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k)):
            now = norm(rearrange(linear(states[0]), "b n (h d) -> b n h d", h=attn.heads))
            wanted = rearrange(rotate(now, angles) / norm.weight, "b n h d -> b n (h d)")
            linear.weight[:], linear.bias[:] = ridge_fit(states[0][features[1]], wanted[features[1]], DAMPING)


def inverse_angles(tokens: int, side: int, axes: list[int], theta: float) -> Tensor:
    """Angles (tokens, sum(axes) / 2) that rotate text tokens back to the origin, for `side` x `side` image tokens."""
    out = []
    for axis, dim in enumerate(axes):
        place = torch.arange(tokens) + side // 2 + (side - side // 2 if axis else 0)
        out.append(-torch.outer(place.float(), theta ** (-torch.arange(0, dim, 2) / dim)))
    return torch.cat(out, 1)


def rotate(vectors: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of neighbouring channels of `vectors` (B, n, heads, d) by `angles` (n, d / 2)."""
    pairs = torch.view_as_complex(rearrange(vectors.float(), "... (d two) -> ... d two", two=2).contiguous())
    angles = repeat(angles, "n d -> n 1 d")
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
