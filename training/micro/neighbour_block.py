"""Adds a T5 block trained to predict neighbouring tokens (the others' attention has collapsed).

T5 does not scale its attention logits. At a learning rate that suits the rest they grow to hundreds, so that every
token attends to a single one whatever the words, and no gradient undoes it. T5 then is a bag of words: "red and blue
stripes" equals "blue and red stripes", and only CLIP's pooled prompt tells which shape becomes which. The new block
starts as the identity and learns from prompts alone. `loop.parameter_groups` keeps its logits from growing too.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from specedit.micro import scenes

from . import build
from .loop import Clock, Log, Settings, fit, seeds
from .probes import cross_entropy
from .train_text import BATCH

TASKS = 1 << 41  # first training seed of these prompts
RATE = 2e-3
LOGIT_SCALE = 8.0  # multiplies the probe's logits, and so its effective learning rate
DISTIL_WEIGHT = 0.3  # weight of the tokens' distance from their old states, in units of the states' variance


def lacks_neighbour_block(pipe: Any) -> bool:
    """Whether an editor's T5 is from before the block was added."""
    return pipe.text_encoder_2.config.num_layers < build.T5_LAYERS


@torch.no_grad()
def add_neighbour_block(pipe: Any) -> nn.Module:
    """Append one block, initialised to the identity, to an editor's T5 in place; returns the block."""
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
    build.attend_to_neighbours(deeper)
    pipe.register_modules(text_encoder_2=deeper.to(encoder.device, encoder.dtype).eval())
    return block


def neighbour_ids(words: Tensor) -> Tensor:
    """The next and the previous token id of each of `words` (B, L), as (B, L, 2); the ends wrap around."""
    return torch.stack([words.roll(-1, 1), words.roll(1, 1)], -1)


def train_neighbour_block(pipe: Any, settings: Settings, log: Log) -> None:
    """Add the block and train it, for `settings.text_minutes`, to predict each token's neighbours by a linear probe.

    The other blocks stay frozen. Distillation keeps the tokens near their old states, which the transformer reads.
    """
    device, tokenizer = settings.device, pipe.tokenizer_2
    old = copy.deepcopy(pipe.text_encoder_2).to(device)
    block = add_neighbour_block(pipe)
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
        neighbours = cross_entropy(LOGIT_SCALE * head(states), neighbour_ids(words), sizes)
        return dict(neighbours=neighbours, drift=DISTIL_WEIGHT * (states - before).square().mean() / before.var())

    groups = [dict(params=[*block.parameters(), *head.parameters()])]
    fit("neighbour_block", losses, groups, RATE, Clock(settings.text_minutes), settings, log)
    encoder.eval().requires_grad_(False)
