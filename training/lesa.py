"""Trains LESA's predictor on a pipeline's trajectories (arXiv 2602.20497).

    python -m training.lesa --out FILE                              # the embedded editor
    python -m training.lesa --out FILE --model DIR --pairs FILE     # another FLUX-Kontext

FILE of --pairs has one JSON object a line: {"image": PATH, "prompt": TEXT}. Use the result with
`install(pipe, forecast="lesa", forecast_weights=FILE)`.

Stage 1, ground truth: at every cached step of a stock trajectory, the forecast from the true earlier outputs is
compared with the true output. Stage 2, closed loop: the trajectory follows the forecasts, with full steps computed
where it is, and is compared with the stock trajectory at the end of every run of cached steps. The transformer is
frozen, and no gradient goes through it.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from specedit import micro
from specedit.config import SpecEditConfig
from specedit.forecast import lesa
from specedit.forecast.base import Differences, full_steps
from specedit.forecast_options import FIRST_FULL
from specedit.layout import MixedLayout
from specedit.method.adapter import LayoutGroup, Run
from specedit.models import adapter_of, adapters

from .micro.loop import seeds


@dataclass
class Trajectory:
    """A stock run: what is needed to repeat it, and its path."""

    run: Run
    group: LayoutGroup  # every token fine
    sigmas: list[float]
    tokens: list[Tensor]  # before each step, and the result: steps + 1 of (1, N, C)
    outputs: list[list[Tensor]]  # of each step, by guidance branch

    def branches(self, tokens: Tensor, step: int) -> list[Tensor]:
        """The transformer's outputs, one for each guidance branch."""
        self.group.tokens = tokens
        return self.run.adapter.predict(self.run, self.group, self.sigmas[step])


@torch.no_grad()
def record(pipe: Any, steps: int, **arguments: Any) -> Trajectory:
    """Run a pipeline without SpecEdit for `steps` steps and record its path.

    Raises:
        TypeError: a pipeline without an adapter.
    """
    adapter = adapter_of(pipe)
    if adapter is None:
        raise TypeError(f"pipeline: expected one of {', '.join(a.pipelines for a in adapters())}, got {type(pipe)}")
    bound = inspect.signature(type(pipe).__call__).bind(pipe, **arguments)
    bound.apply_defaults()
    call = {name: value for name, value in bound.arguments.items() if name != "self"}
    config = SpecEditConfig(steps=(0, 0, 1))
    state = adapter.prepare(pipe, call, config)
    run = Run(adapter, pipe, config, state)
    sigmas = adapter.sigmas(pipe, state.grid.tokens, 1.0, 0.0, steps).tolist()
    layout, beside = (MixedLayout.all_fine(grid, state.device) for grid in (state.grid, state.reference_grid))
    group = LayoutGroup(list(range(state.batch)), layout, state.reference, beside, state.noise, sigmas)
    trajectory = Trajectory(run, group, sigmas, [state.noise], [])
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        tokens = trajectory.tokens[-1]
        outputs = trajectory.branches(tokens, step)
        trajectory.outputs.append(outputs)
        trajectory.tokens.append(tokens + (following - sigma) * adapter.guide(run, outputs))
    return trajectory


@dataclass
class Sample:
    """One forecast of stage 1, reduced to the terms of its squared error |y - sum c_k D_k|^2 / |y|^2."""

    gap: float
    sigma: float
    start: float
    gram: Tensor  # (K, K) of the differences
    product: Tensor  # (K,) of differences and true output; both are divided by |y|^2

    @property
    def inputs(self) -> tuple[float, float, float]:
        """The predictor's inputs."""
        return self.gap, self.sigma, self.start

    def loss(self, coefficients: Tensor) -> Tensor:
        return coefficients @ self.gram @ coefficients - 2 * self.product @ coefficients + 1


def samples(trajectory: Trajectory, interval: int, order: int) -> Iterable[Sample]:
    """A sample for every cached step and guidance branch of a trajectory at one interval."""
    full = full_steps(len(trajectory.outputs), interval, max(FIRST_FULL, order + 1))
    for branch in range(len(trajectory.outputs[0])):
        differences = Differences(order)
        for step, outputs in enumerate(trajectory.outputs):
            truth = outputs[branch]
            if full[step]:
                differences.observe(step, truth)
                continue
            rows = differences.stack.flatten(1).double()
            scale = truth.double().square().sum()
            gap = float(step - differences.steps[0])
            gram, product = rows @ rows.T / scale, rows @ truth.flatten().double() / scale
            start = trajectory.sigmas[differences.steps[0]]
            yield Sample(gap, trajectory.sigmas[step], start, gram.float().cpu(), product.float().cpu())


def average_duplicates(data: Iterable[Sample]) -> list[Sample]:
    """Merge samples with the same predictor inputs. They share coefficients, so their errors average."""
    groups: dict[tuple[float, float, float], list[Sample]] = {}
    for sample in data:
        groups.setdefault(sample.inputs, []).append(sample)
    return [
        Sample(*key, *(torch.stack([getattr(s, name) for s in group]).mean(0) for name in ("gram", "product")))
        for key, group in groups.items()
    ]


def ground_truth(predictor: lesa.Predictor, data: list[Sample], epochs: int, rate: float, seed: int) -> list[float]:
    """Stage 1. Returns the mean relative squared error before, and after every epoch."""
    optimizer = torch.optim.Adam(predictor.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)

    def mean() -> float:
        with torch.no_grad():
            return sum(s.loss(predictor(*s.inputs)).item() for s in data) / len(data)

    history = [mean()]
    for _ in tqdm(range(epochs), desc="ground truth"):
        for at in torch.randperm(len(data), generator=generator).split(32):
            losses = [data[i].loss(predictor(*data[i].inputs)) for i in at.tolist()]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
        history.append(mean())
    return history


def rollout(predictor: lesa.Predictor, trajectory: Trajectory, interval: int) -> list[Tensor]:
    """Stage 2's losses of one closed-loop run, one for each run of cached steps.

    Each is the squared distance from the stock trajectory at the end, relative to the distance that stock covered.
    """
    steps = len(trajectory.outputs)
    full = full_steps(steps, interval, max(FIRST_FULL, predictor.order + 1))
    histories = [Differences(predictor.order) for _ in trajectory.outputs[0]]
    tokens, start, losses = trajectory.tokens[0], 0, []
    for step in range(steps):
        if full[step]:
            tokens = tokens.detach()
            with torch.no_grad():
                outputs = trajectory.branches(tokens, step)
            for differences, output in zip(histories, outputs, strict=True):
                differences.observe(step, output)
            start = step
        else:
            weights = predictor(float(step - start), trajectory.sigmas[step], trajectory.sigmas[start])
            outputs = [torch.einsum("k,k...->...", weights.to(d.stack.device), d.stack) for d in histories]
        velocity = trajectory.run.adapter.guide(trajectory.run, outputs)
        tokens = tokens + (trajectory.sigmas[step + 1] - trajectory.sigmas[step]) * velocity
        if not full[step] and (step + 1 == steps or full[step + 1]):
            truth = trajectory.tokens[step + 1]
            moved = (truth - trajectory.tokens[start]).square().sum().clamp_min(1e-12)
            losses.append((tokens - truth).square().sum() / moved)
    return losses


def closed_loop(
    predictor: lesa.Predictor, trajectories: list[Trajectory], intervals: list[int], epochs: int, rate: float
) -> list[float]:
    """Stage 2. Returns the mean loss of every epoch."""
    optimizer = torch.optim.Adam(predictor.parameters(), lr=rate)
    history = []
    for _ in range(epochs):
        total = []
        runs = [(trajectory, interval) for trajectory in trajectories for interval in intervals]
        for trajectory, interval in tqdm(runs, desc="closed loop"):
            losses = rollout(predictor, trajectory, interval)
            if not losses:
                continue  # the run is too short for a forecast
            loss = torch.stack(losses).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
            optimizer.step()
            total.append(loss.item())
        history.append(sum(total) / max(1, len(total)))
    return history


def editor_calls(cases: int, size: int) -> Iterable[dict[str, Any]]:
    """Calls of the embedded editor on `cases` scenes that no test uses."""
    for seed in seeds(5_000_000, cases):
        case = micro.scenes.sample(seed, size)
        generator = torch.Generator().manual_seed(seed)
        yield dict(image=case.source, prompt=case.prompt, generator=generator, **micro.arguments(case.source))


def file_calls(pairs: Path, cases: int) -> Iterable[dict[str, Any]]:
    """Calls from a --pairs file.

    Raises:
        ValueError: a line that is not a pair; names the line.
    """
    for number, line in enumerate(pairs.read_text().splitlines()[:cases], 1):
        try:
            pair = json.loads(line)
            image = Image.open(pairs.parent / pair["image"]).convert("RGB")
            yield dict(image=image, prompt=pair["prompt"], generator=torch.Generator().manual_seed(number))
        except (json.JSONDecodeError, KeyError, TypeError, OSError) as error:
            expected = '{"image": PATH, "prompt": TEXT}'
            raise ValueError(f"{pairs} line {number}: expected {expected}, got {line[:80]!r} ({error})") from error


def train(pipe: Any, calls: Iterable[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Record trajectories, train both stages and write `options.out`; returns the losses of each stage."""
    torch.manual_seed(options.seed)
    turns = zip(tqdm(list(calls), desc="trajectories"), itertools.cycle(options.steps))
    trajectories = [record(pipe, steps, **call) for call, steps in turns]
    if not trajectories:
        raise ValueError("expected at least one case to train on, got none")
    predictor = lesa.Predictor(options.order, options.experts, options.width)
    data = average_duplicates(s for t in trajectories for n in options.intervals for s in samples(t, n, options.order))
    if not data:
        raise ValueError(f"expected more steps than {options.steps}, at these intervals nothing is forecast")
    losses = {"ground_truth": ground_truth(predictor, data, options.epochs, options.rate, options.seed)}
    losses["closed_loop"] = closed_loop(
        predictor, trajectories, options.intervals, options.closed_epochs, options.rate / 4
    )
    lesa.save(predictor, options.out, pipe.transformer.config)
    return losses


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="training.lesa", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--model", default="micro", help='"micro", or a directory of a FluxKontextPipeline')
    parser.add_argument("--pairs", type=Path, help="pictures and prompts for another model, one JSON object a line")
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--size", type=int, default=128, help="side in px of the embedded editor's scenes")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[50, 20], help="lengths of runs, one for each case in turn"
    )
    parser.add_argument("--intervals", type=int, nargs="+", default=[3, 4, 6, 9])
    parser.add_argument("--order", type=int, default=2)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=60, help="of the first stage")
    parser.add_argument("--closed-epochs", type=int, default=3, help="of the second stage")
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.model != "micro" and options.pairs is None:
        parser.error("--pairs: expected a file of pictures and prompts with --model, got none")
    for name, low in (("cases", 1), ("order", 1), ("experts", 1), ("width", 1), ("epochs", 0)):
        if getattr(options, name) < low:
            parser.error(f"--{name}: expected at least {low}, got {getattr(options, name)}")
    for name in ("steps", "intervals"):
        if min(getattr(options, name)) < 2:
            parser.error(f"--{name}: expected integers of at least 2, got {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if options.model == "micro":
            pipe, calls = micro.load("kontext", device=device), editor_calls(options.cases, options.size)
        else:
            from diffusers import FluxKontextPipeline

            pipe = FluxKontextPipeline.from_pretrained(options.model, torch_dtype=torch.bfloat16).to(device)
            calls = file_calls(options.pairs, options.cases)
        losses = train(pipe, calls, options)
    except (OSError, ValueError) as error:
        print(f"training.lesa: {error}", file=sys.stderr)
        return 2
    print(f"ground truth: {losses['ground_truth'][0]:.4g} -> {losses['ground_truth'][-1]:.4g}")
    print("closed loop: " + ", ".join(f"{loss:.4g}" for loss in losses["closed_loop"]))
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
