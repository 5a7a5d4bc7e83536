"""Distils the embedded Kontext editor into a few-step student: a LoRA for `load_lora_weights`.

    pip install "specedit[distil]"
    python -m training.distil [--out DIR] [--minutes 60]

One student step covers several teacher steps. From a noised target x at sigma_i, the teacher (the editor without the
LoRA) takes `substeps` Euler steps to sigma_{i+1}. The student's velocity at sigma_i is trained to get there in one:
v = (x_teacher - x) / (sigma_{i+1} - sigma_i). This is one round of progressive distillation (Salimans and Ho, arXiv
2202.00512) for the sigmas that the student will run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specedit.method.schedule import stage_sigmas
from specedit.micro import STUDENT, load, scenes

from .micro.family_kontext import text, velocity_at
from .micro.loop import descend, seeds
from .micro.train_editor import Batch, encode, token_weights

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj",
           "net.2", "proj_mlp", "proj_out"]  # fmt: skip
GUIDANCE = 3.5  # FluxKontextPipeline's default
SIZES = {(64, 64): 16, (128, 128): 8, (256, 256): 2}


def add_lora(transformer: Any, rank: int) -> list[Tensor]:
    """Add a new LoRA to the blocks' linear layers; returns its parameters, the only trainable ones.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError('distillation needs peft: pip install "specedit[distil]"') from error
    blocks = [
        name for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and "blocks." in name and name.endswith(tuple(TARGETS))
    ]  # fmt: skip
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=blocks))
    return [p for p in transformer.parameters() if p.requires_grad]


def velocity(pipe: Any, batch: Batch, x: Tensor, sigma: float, prompt: tuple[Tensor, Tensor]) -> Tensor:
    """The transformer's velocity (B, N, C) at one noise level."""
    one = torch.ones(len(x), device=x.device)
    return velocity_at(pipe, x, batch.source, batch.grid, one * sigma, prompt, one * GUIDANCE).float()


@torch.no_grad()
def target(pipe: Any, batch: Batch, x: Tensor, start: float, end: float, substeps: int, prompt: Any) -> Tensor:
    """The constant velocity from x at `start` to the teacher's result at `end`."""
    pipe.transformer.disable_adapters()
    try:
        state = x
        sigmas = torch.linspace(start, end, substeps + 1).tolist()
        for sigma, following in itertools.pairwise(sigmas):
            state = state + (following - sigma) * velocity(pipe, batch, state, sigma, prompt)
    finally:
        pipe.transformer.enable_adapters()
    return (state - x) / (end - start)


def loss_of(pipe: Any, batch: Batch, step: int, options: argparse.Namespace) -> Tensor:
    """Squared error of the student at one step, relative to the teacher's velocity, with `token_weights`."""
    sigmas = stage_sigmas(pipe.scheduler, batch.target.shape[1], 1.0, 0.0, options.student_steps).tolist()
    start, end = sigmas[step], sigmas[step + 1]
    with torch.no_grad():
        prompt = text(pipe, batch.prompts, None, batch.target.device)
    x = (1 - start) * batch.target + start * torch.randn_like(batch.target)
    wanted = target(pipe, batch, x, start, end, options.substeps, prompt)
    error = (velocity(pipe, batch, x, start, prompt) - wanted).square().mean(-1)
    weight = token_weights(batch.edited)
    return (error * weight).sum() / (wanted.square().mean(-1) * weight).sum()


def batches(pipe: Any, options: argparse.Namespace) -> Iterator[Batch]:
    """Endless batches of scenes that no test uses, in sizes up to `largest`."""
    rng, drawn = random.Random(options.seed), 10_000_000
    sizes = [size for size in SIZES if max(size) <= options.largest]
    while True:
        size = rng.choice(sizes)
        yield encode(pipe, [scenes.describe(s) for s in seeds(drawn, SIZES[size])], size, str(pipe.device))
        drawn += SIZES[size]


def train(pipe: Any, options: argparse.Namespace) -> list[float]:
    """Distil for `minutes` or `updates`, whichever ends first, and write the LoRA; returns the losses."""
    torch.manual_seed(options.seed)
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.eval().requires_grad_(False)
    parameters = add_lora(pipe.transformer, options.rank)
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.0)
    rng = random.Random(options.seed)
    began, losses = time.monotonic(), []
    for update, batch in enumerate(batches(pipe, options)):
        progress = max((time.monotonic() - began) / (60 * options.minutes), update / (options.updates or 10**9))
        if progress >= 1:
            break
        loss = loss_of(pipe, batch, rng.randrange(options.student_steps), options)
        descend(loss, parameters, [optimizer], options.rate * min(1.0, (update + 1) / 20) * (1 - progress))
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            print(f"update {len(losses)}: loss {sum(losses[-50:]) / 50:.4f}", flush=True)
    save(pipe, options, losses)
    pipe.transformer.unload_lora()  # the pipeline is the teacher again
    return losses


def save(pipe: Any, options: argparse.Namespace, losses: list[float]) -> None:
    """Write the LoRA for `load_lora_weights`, and its settings to `student.json` next to it."""
    from peft import get_peft_model_state_dict

    layers = {name: value.half() for name, value in get_peft_model_state_dict(pipe.transformer).items()}
    type(pipe).save_lora_weights(options.out, transformer_lora_layers=layers)
    facts = dict(student_steps=options.student_steps, substeps=options.substeps, rank=options.rank, updates=len(losses))
    (Path(options.out) / "student.json").write_text(json.dumps(facts, indent=1) + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="training.distil", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=STUDENT, help="folder of the LoRA (default: the package's own)")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--updates", type=int, help="stop after this many updates at the latest")
    parser.add_argument("--student-steps", type=int, default=8)
    parser.add_argument("--substeps", type=int, default=4, help="teacher steps per student step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--largest", type=int, default=256, help="longest side in px")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name, low in (("student_steps", 1), ("substeps", 2), ("rank", 1), ("largest", 64)):
        if getattr(options, name) < low:
            parser.error(f"--{name.replace('_', '-')}: expected at least {low}, got {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        pipe = load("kontext", device="cuda" if torch.cuda.is_available() else "cpu")
        losses = train(pipe, options)
    except (ImportError, OSError) as error:
        print(f"training.distil: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out} after {len(losses)} updates")
    return 0


if __name__ == "__main__":
    sys.exit(main())
