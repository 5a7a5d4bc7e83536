"""Initialises FLUX's image tokens so that they can tell their absolute position.

Rotary embeddings are relative, so image tokens see each other relative to themselves. Only text tokens share one
position, the origin: how much an image token attends to each of several of them can encode where it is. Training hardly
finds that alone. Checkerboards and objects "at the left" need it, and so do outlines, whose tokens must know how far
they are from the centre.

So every prompt ends with a few extra tokens, the landmarks (like registers, Darcet et al. 2024, they are the same for
every input): half for rows, half for columns. In the first block two heads attend to them, each at its own frequency
theta: a token in row p gives the rows' landmark j a weight proportional to exp(A cos(theta p - 2 pi j / PHASES)). This
is an initialisation only; everything stays trainable.
"""

import math
from typing import Any

import torch
from tokenizers import processors
from torch import Tensor

from specedit.micro import scenes

from . import family_kontext
from .first_blocks import only_first
from .loop import seeds

PHASES = 6  # landmarks of an axis
LANDMARKS = 2 * PHASES
NAMES = [f"<landmark{i}>" for i in range(LANDMARKS)]
# Heads of the first block, and the rotary pair of each axis that they use: 10000^(-2 * 3 / 28) = 0.14 and 0.52 radians
# a token, a period of 45 and of 12 tokens. Head 0 attends to its own reference token.
LANDMARK_HEADS = ((1, 3), (2, 1))
EMBEDDING_SCALE = 100.0  # standard deviation of their embeddings, above what T5's blocks add
SAMPLES = 256  # prompts that keys and values are fitted to
DAMPING = 1e-3


@torch.no_grad()
def add_landmarks(pipe: Any) -> None:
    """Give an editor landmarks and reinitialise two heads to attend to them, in place. Does nothing if it has them."""
    if has_landmarks(pipe):
        return
    pipe.to("cpu")  # little work; training moves it to its device again
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _add_tokens(pipe)
        states, marks = _text_states(pipe)
        _attend_to_landmarks(pipe.transformer, states, marks)


def has_landmarks(pipe: Any) -> bool:
    """Whether an editor has landmarks."""
    return NAMES[0] in pipe.tokenizer_2.get_vocab()


def _add_tokens(pipe: Any) -> None:
    """Append the landmarks, with random embeddings, to every prompt."""
    tokenizer, encoder = pipe.tokenizer_2, pipe.text_encoder_2
    tokenizer.add_special_tokens({"additional_special_tokens": NAMES})
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(["$A", end, *NAMES]),
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in (end, *NAMES)],
    )
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    encoder.get_input_embeddings().weight[-LANDMARKS:].normal_(std=EMBEDDING_SCALE)


def _text_states(pipe: Any) -> tuple[Tensor, Tensor]:
    """Inputs of the first block's text projections (n, width) float32 for some prompts at all noise levels.

    Also each token's landmark index (n,) int64, -1 for other tokens.
    """
    tokenizer, transformer = pipe.tokenizer_2, pipe.transformer
    prompts = [scenes.describe(seed).prompt for seed in seeds(1 << 41, SAMPLES)]
    features = family_kontext.text(pipe, prompts, None, "cpu")
    recorded: list[Tensor] = []
    hook = transformer.transformer_blocks[0].attn.add_k_proj.register_forward_pre_hook(
        lambda _module, inputs: recorded.append(inputs[0].float())
    )
    noise = torch.randn(SAMPLES, 4, transformer.config.in_channels)
    with only_first(transformer, 1):
        family_kontext.velocity(pipe, noise, noise, (2, 2), torch.rand(SAMPLES), features)
    hook.remove()
    return recorded[0].flatten(0, 1), landmark_index(tokenizer, prompts, features[0].shape[1]).flatten()


def landmark_index(tokenizer: Any, prompts: list[str], length: int) -> Tensor:
    """Landmark index of each token of the prompts, padded to `length`: (B, length) int64, -1 for other tokens."""
    ids = tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt").input_ids
    first = tokenizer.convert_tokens_to_ids(NAMES[0])
    return torch.where((ids >= first) & (ids < first + LANDMARKS), ids - first, -1)


def _attend_to_landmarks(transformer: Any, states: Tensor, marks: Tensor) -> None:
    """Write the two heads: constant image queries, and text keys and values fitted to the landmarks."""
    attn, axes, size = (
        transformer.transformer_blocks[0].attn, transformer.config.axes_dims_rope, transformer.config.attention_head_dim
    )  # fmt: skip
    still = axes[0] - 2  # channels of the image axis' slowest pair, hardly rotated
    angles = 2 * math.pi * torch.arange(PHASES) / PHASES
    spread = 4 * float(attn.to_out[0].weight.std())  # large enough to matter in later layers
    for head, pair in LANDMARK_HEADS:
        rows = slice(head * size, (head + 1) * size)
        query, other = torch.zeros(size), torch.zeros(size)
        keys, values = torch.zeros(LANDMARKS + 1, size), torch.randn(LANDMARKS + 1, size).sign()
        query[still], other[still], keys[:, still] = 1.0, -1.0, 1.0  # only landmarks get attention
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
            linear.weight[rows], linear.bias[rows] = ridge_fit(states, wanted[marks])
        attn.to_out[0].weight[:, rows].normal_(std=spread)
        attn.to_add_out.weight[:, rows] = 0


def ridge_fit(states: Tensor, wanted: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Weight (e, d) and bias (e,) of the ridge regression from `states` (n, d) to `wanted` (n, e)."""
    known = torch.cat([states, torch.ones(len(states), 1)], 1)
    gram = known.T @ known / len(known)
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram))
    solved = torch.linalg.solve(damped, known.T @ wanted / len(known))
    return solved[:-1].T, solved[-1]
