"""Lets T5's tokens know what stands beside them, in an editor whose training has made them deaf to each other.

T5 does not scale its attention's logits. At a learning rate that suits the rest they grow to hundreds: every token
looks at one other only, whatever the words, and no gradient leads back. What is left is a bag of words, in which "red
and blue stripes" are "blue and red stripes" and only CLIP's pooled output tells which shape becomes which. Such an
editor gets one more block, which adds nothing at first and learns from prompts alone to tell of every token which ones
are beside it. `training.optimizers` keeps logits from growing so again.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from . import build, scenes
from .questions import cross_entropy
from .train_text import BATCH
from .training import Clock, Log, Settings, fit, seeds

TASKS = 1 << 41  # where the stretch of tasks begins whose prompts are read
RATE = 2e-3
LOUDER = 8.0  # times the reading, which learns as much faster for it
NEAR = 0.3  # weight of how far the tokens go from what the transformer has learned to read, in shares of their variance


def shallow(pipe: Any) -> bool:
    """Whether an editor's T5 is from before its tokens were told of their neighbours."""
    return pipe.text_encoder_2.config.num_layers < build.T5_LAYERS


@torch.no_grad()
def deepen(pipe: Any) -> nn.Module:
    """Give an editor's T5 one more block, which adds nothing yet, in place; returns it."""
    encoder = pipe.text_encoder_2
    config = copy.deepcopy(encoder.config)
    config.num_layers += 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        deeper = T5EncoderModel(config)
    deeper.load_state_dict(encoder.state_dict(), strict=False)
    block = deeper.encoder.block[-1]
    for out in (block.layer[0].SelfAttention.o, block.layer[1].DenseReluDense.wo):
        out.weight.zero_()
    build.look_around(deeper)
    pipe.register_modules(text_encoder_2=deeper.to(encoder.device, encoder.dtype).eval())
    return block


def neighbours(words: Tensor) -> Tensor:
    """The token after and the one before each of `words` (B, L): (B, L, 2), at the ends the other end's."""
    return torch.stack([words.roll(-1, 1), words.roll(1, 1)], -1)


def train_order(pipe: Any, settings: Settings, log: Log) -> None:
    """Deepen T5 and teach its new block, for `settings.text_minutes`, to tell of every token which ones are beside it.

    The other blocks stay, and what the tokens were before is kept near, since the transformer reads it.
    """
    device, tokenizer = settings.device, pipe.tokenizer_2
    old = copy.deepcopy(pipe.text_encoder_2).to(device)
    block = deepen(pipe)
    encoder = pipe.text_encoder_2.to(device).requires_grad_(False)
    block.requires_grad_(True)
    sizes = (encoder.config.vocab_size,) * 2
    head = nn.Linear(encoder.config.d_model, sum(sizes)).to(device)

    def losses(step: int) -> dict[str, Tensor]:
        prompts = [scenes.describe(s).prompt for s in seeds(TASKS + step * BATCH, BATCH)]
        padded = dict(padding="max_length", truncation=True, max_length=tokenizer.model_max_length)
        words = tokenizer(prompts, return_tensors="pt", **padded).input_ids.to(device)
        with torch.no_grad():
            before = old(words)[0]
        states = encoder(words)[0]
        beside = cross_entropy(LOUDER * head(states), neighbours(words), sizes)
        return dict(beside=beside, moved=NEAR * (states - before).square().mean() / before.var())

    groups = [dict(params=[*block.parameters(), *head.parameters()])]
    fit("order", losses, groups, RATE, Clock(settings.text_minutes), settings, log)
    encoder.eval().requires_grad_(False)
