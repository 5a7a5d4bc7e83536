"""Lets FLUX's picture tokens see where they are, before training.

FLUX knows positions by rotation alone, so picture tokens see each other relative to themselves. Only its text tokens
stand at one place, the origin: how much a token looks at each of several of them can tell it where in the picture it
is. Left alone, training hardly finds that; checkerboards and objects "at the left" need it, and so does an outline,
whose tokens must know how far from its centre they are.

So every prompt ends with a few tokens of their own, the landmarks (like the registers of Darcet et al. 2024 they hold
nothing of the input): half of them for rows, half for columns. In the first block two heads look at them, each at its
own frequency theta: a token in row p gives the rows' landmark j the weight exp(A cos(theta p - 2 pi j / PHASES)) over
the sum of all. Only where training starts is fixed by it.
"""

import math
from typing import Any

import torch
from tokenizers import processors
from torch import Tensor

from . import family_kontext, scenes
from .training import seeds

PHASES = 6  # landmarks of an axis
LANDMARKS = 2 * PHASES
NAMES = [f"<landmark{i}>" for i in range(LANDMARKS)]
# Head of the first block and its rotary pair of either axis: 10000^(-2 * 3 / 28) = 0.14 and 0.52 radians a token, so
# once round in 45 tokens and in 12. The head before these two looks at its own place in the reference.
LOOKS = ((1, 3), (2, 1))
LOUD = 100.0  # standard deviation of their embeddings: more than T5's blocks add to them, so that each stays itself
SAMPLES = 256  # prompts whose text states keys and values are fitted to
DAMPING = 1e-3


@torch.no_grad()
def place(pipe: Any) -> None:
    """Give an editor landmarks, and two heads that look at them in place of what those heads did; once is enough."""
    if placed(pipe):
        return
    pipe.to("cpu")  # little work; whoever trains brings it to a device again
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _name(pipe)
        states, marks = _states(pipe)
        _look(pipe.transformer, states, marks)


def placed(pipe: Any) -> bool:
    """Whether an editor has landmarks."""
    return NAMES[0] in pipe.tokenizer_2.get_vocab()


def _name(pipe: Any) -> None:
    """Let every prompt end with the landmarks, whose embeddings are random."""
    tokenizer, encoder = pipe.tokenizer_2, pipe.text_encoder_2
    tokenizer.add_special_tokens({"additional_special_tokens": NAMES})
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(["$A", end, *NAMES]),
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in (end, *NAMES)],
    )
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    encoder.get_input_embeddings().weight[-LANDMARKS:].normal_(std=LOUD)


def _states(pipe: Any) -> tuple[Tensor, Tensor]:
    """What the first block's text projections see of some prompts at all noise levels, (n, width) float32, and which
    landmark each is: (n,) int64, -1 for the other tokens."""
    tokenizer, transformer = pipe.tokenizer_2, pipe.transformer
    prompts = [scenes.describe(seed).prompt for seed in seeds(1 << 41, SAMPLES)]
    features = family_kontext.text(pipe, prompts, None, "cpu")
    seen: list[Tensor] = []
    hook = transformer.transformer_blocks[0].attn.add_k_proj.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].float())
    )
    noise = torch.randn(SAMPLES, 4, transformer.config.in_channels)
    family_kontext.velocity(pipe, noise, noise, (2, 2), torch.rand(SAMPLES), features)
    hook.remove()
    return seen[0].flatten(0, 1), which(tokenizer, prompts, features[0].shape[1]).flatten()


def which(tokenizer: Any, prompts: list[str], length: int) -> Tensor:
    """Which landmark each token of the prompts, padded to `length`, is: (B, length) int64, -1 for the others."""
    ids = tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt").input_ids
    first = tokenizer.convert_tokens_to_ids(NAMES[0])
    return torch.where((ids >= first) & (ids < first + LANDMARKS), ids - first, -1)


def _look(transformer: Any, states: Tensor, marks: Tensor) -> None:
    attn, axes, size = (
        transformer.transformer_blocks[0].attn, transformer.config.axes_dims_rope, transformer.config.attention_head_dim
    )  # fmt: skip
    still = axes[0] - 2  # channels of the time axis' slowest pair: hardly turned by anything
    angles = 2 * math.pi * torch.arange(PHASES) / PHASES
    spread = 4 * float(attn.to_out[0].weight.std())  # loud enough to be heard in what follows
    for head, pair in LOOKS:
        rows = slice(head * size, (head + 1) * size)
        query, other = torch.zeros(size), torch.zeros(size)
        keys, values = torch.zeros(LANDMARKS + 1, size), torch.randn(LANDMARKS + 1, size).sign()
        query[still], other[still], keys[:, still] = 1.0, -1.0, 1.0  # nothing but landmarks is looked at
        for axis, start in enumerate((axes[0], axes[0] + axes[1])):
            turning, of_axis = start + 2 * pair, slice(axis * PHASES, (axis + 1) * PHASES)
            query[turning] = 1.0
            keys[of_axis, turning], keys[of_axis, turning + 1] = angles.cos(), angles.sin()
        keys[-1], values[-1] = other, 0
        for linear, constant in (
            (attn.to_q, query / attn.norm_q.weight), (attn.to_k, other), (attn.to_v, values[-1])
        ):  # fmt: skip
            linear.weight[rows], linear.bias[rows] = 0, constant
        for linear, wanted in ((attn.add_k_proj, keys / attn.norm_added_k.weight), (attn.add_v_proj, values)):
            linear.weight[rows], linear.bias[rows] = fit(states, wanted[marks])
        attn.to_out[0].weight[:, rows].normal_(std=spread)
        attn.to_add_out.weight[:, rows] = 0


def fit(states: Tensor, wanted: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear map from `states` (n, d) that comes nearest to `wanted` (n, e)."""
    known = torch.cat([states, torch.ones(len(states), 1)], 1)
    gram = known.T @ known / len(known)
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram))
    solved = torch.linalg.solve(damped, known.T @ wanted / len(known))
    return solved[:-1].T, solved[-1]
