"""The command line: `specedit demo | edit | eval | bench`."""

from __future__ import annotations

import argparse
import inspect
import sys
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NoReturn

from .config import CHOICES, DEFAULT_PRESET, presets

EDITORS = ("kontext", "qwen")  # that specedit.micro can load


class Failure(Exception):
    """An error that the user can do something about: one line, exit code 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse itself prints the usage too, which takes several lines
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = _Parser(prog="specedit", description="Fast diffusion image editing.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_edit(commands)
    _add_eval(commands)
    _add_bench(commands)
    args = parser.parse_args(arguments)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("specedit: stopped", file=sys.stderr)
        return 130
    except (Failure, ValueError, TypeError, OSError, ImportError) as error:
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        print(f"specedit: {first}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        print("specedit: out of memory; a smaller picture or model takes less", file=sys.stderr)
        return 2


def _check_size(size: int, low: int, high: int | None = None) -> None:
    if size < low or size % 16 or (high is not None and size > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise Failure(f"--size: expected a multiple of 16 {limits}, got {size}")


def _check_output(path: Path, kinds: Collection[str]) -> None:
    """Before any work: whether a picture can be written to `path`. `kinds`: suffixes with their dot."""
    if path.suffix.lower() not in kinds:
        raise Failure(f"expected a picture file such as {path.stem}.png, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)


def _add_model(parser) -> None:
    parser.add_argument("--model", default=EDITORS[0], choices=EDITORS, help="which embedded editor")


def _add_demo(commands) -> None:
    parser = commands.add_parser("demo", help="edit one photograph twice, stock and with SpecEdit; no GPU, no network")
    _add_model(parser)
    parser.add_argument("--out", type=Path, default=Path("specedit-demo"), help="folder for the pictures")
    parser.add_argument("--size", type=int, default=512, help="side in pixels, 128 to 512")
    parser.add_argument("--preset", default="turbo", choices=list(presets))
    parser.add_argument("--restore", default="reference", choices=CHOICES["restore"])
    parser.add_argument("--seed", type=int, help="another task")
    parser.set_defaults(run=_demo)


def _demo(args) -> int:
    _check_size(args.size, 128, 512)
    args.out.mkdir(parents=True, exist_ok=True)
    _quiet()
    from . import demo

    seed = demo.SEED if args.seed is None else args.seed
    keep = args.restore == "reference"
    result = demo.run(args.size, args.preset, seed, args.model, restore=args.restore, keep_pixels=keep)
    result.case.source.save(args.out / "input.png")
    result.stock.save(args.out / "stock.png")
    result.edit.save(args.out / "specedit.png")
    result.save_figure(args.out / "demo.png")
    result.run.save_figure(args.out / "report.png")
    print(f'\n"{result.case.prompt}", {args.size} x {args.size} px, preset {args.preset}\n')
    print(result.table())
    print(f"\n{result.run}\n\npictures in {args.out}: demo.png, report.png, input.png, stock.png, specedit.png")
    return 0


def _add_edit(commands) -> None:
    parser = commands.add_parser("edit", help="edit a picture with any supported pipeline")
    parser.add_argument("image", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--model", help="hub id or directory of a pipeline, or an embedded editor: kontext, qwen")
    parser.add_argument("--negative-prompt", help="what to keep away from; Qwen's guidance needs one, if only a space")
    parser.add_argument("--preset", default=DEFAULT_PRESET, choices=list(presets))
    parser.add_argument("--out", type=Path, default=Path("edit.png"))
    parser.add_argument("--mask", type=Path, help="picture that is nonzero where to edit; instead of the draft")
    parser.add_argument("--restore", choices=CHOICES["restore"])
    parser.add_argument("--keep-pixels", action="store_true", help="leave every pixel outside the edit as it was")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="also write where the method looked and what it cost")
    parser.set_defaults(run=_edit)


def _edit(args) -> int:
    if not args.image.is_file():
        raise Failure(f"image: expected a picture file, got {args.image}, which does not exist")
    if not args.prompt.strip():
        raise Failure("prompt: expected what to change, got an empty text")
    _quiet()
    import torch
    from matplotlib.backend_bases import FigureCanvasBase
    from PIL import Image

    from . import install
    from .install import last_report

    _check_output(args.out, [suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE])
    if args.figure is not None:
        _check_output(args.figure, [f".{kind}" for kind in FigureCanvasBase.get_supported_filetypes()])
    image = _open(args.image).convert("RGB")
    mask = None if args.mask is None else _open(args.mask)
    pipe, image, given = _pipeline(args.model, image)
    if args.negative_prompt is not None:
        given["negative_prompt"] = args.negative_prompt
    overrides = {} if args.restore is None else {"restore": args.restore}
    install(pipe, args.preset, keep_pixels=args.keep_pixels, **overrides)
    generator = torch.Generator().manual_seed(args.seed)
    result = pipe(image=image, prompt=args.prompt, edit_mask=mask, generator=generator, **given).images[0]
    result.save(args.out)
    if (done := last_report(pipe)) is not None:
        print(done)
        if args.figure is not None:
            done.save_figure(args.figure)
    elif args.figure is not None:
        print(f"specedit: no {args.figure}, because the stock pipeline ran", file=sys.stderr)
    print(f"wrote {args.out}")
    return 0


def _open(path: Path):
    """A picture as its viewer shows it: cameras write which side is up beside the pixels."""
    from PIL import Image, ImageOps

    try:
        return ImageOps.exif_transpose(Image.open(path))
    except Image.DecompressionBombError as error:
        raise Failure(f"{path}: {error}") from error


def _pipeline(model: str | None, image):
    """The pipeline, the picture at a size it takes, and what to pass beside it."""
    import torch

    from . import micro

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if model is None or model in EDITORS:
        image, model = _fit(image, 512), model or EDITORS[0]
        return micro.load(model, device=device), image, micro.arguments(image, model)
    from diffusers import DiffusionPipeline

    folder = Path(model)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise Failure(f"--model: expected a pipeline directory with a model_index.json, got {model}")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype).to(device)
    taken = inspect.signature(type(pipe).__call__).parameters
    # A small editor, which works at the picture's own size; FLUX.1-Kontext has 19 such layers.
    if "max_area" in taken and pipe.transformer.config.num_layers < 19:
        image = _fit(image, 512)
        return pipe, image, micro.arguments(image)
    # Some pipelines choose the size themselves.
    return pipe, image, {name: getattr(image, name) for name in ("height", "width") if name in taken}


def _fit(image, largest: int):
    """Resize to at most `largest` px a side and whole tokens of 16 px."""
    from .models.images import SMALLEST

    if min(image.size) < SMALLEST:
        raise Failure(f"image: expected at least {SMALLEST} px a side, got {image.width} x {image.height}")
    scale = min(1.0, largest / max(image.size))
    width, height = (round(side * scale) // 16 * 16 for side in image.size)
    if min(width, height) < SMALLEST:
        raise Failure(f"image: expected sides less unequal, got {image.width} x {image.height}")
    return image if (width, height) == image.size else image.resize((width, height))


def _add_eval(commands) -> None:
    parser = commands.add_parser("eval", help="score a preset on tasks with exact results")
    parser.add_argument("what", choices=["micro"])
    _add_model(parser)
    parser.add_argument("--preset", default=DEFAULT_PRESET, choices=[*presets, "stock"])
    parser.add_argument("--restore", default="full", choices=CHOICES["restore"])
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, help="model evaluations, instead of the preset's (stock: 50)")
    parser.add_argument("--json", type=Path)
    parser.set_defaults(run=_eval)


def _eval(args) -> int:
    if args.cases < 1:
        raise Failure(f"--cases: expected at least 1, got {args.cases}")
    if args.steps is not None and args.steps < 1:
        raise Failure(f"--steps: expected at least 1, got {args.steps}")
    _check_size(args.size, 64)
    _quiet()
    from tqdm.auto import tqdm

    from . import install, micro, results

    pipe = micro.load(args.model)
    pipe.set_progress_bar_config(disable=True)
    if args.preset != "stock":
        install(pipe, args.preset, restore=args.restore)
    cases = (micro.scenes.sample(seed, args.size) for seed in range(args.cases))
    result = micro.evaluate(pipe, tqdm(cases, total=args.cases, desc=args.preset), args.steps)
    print(f"{'':12}{'tasks':>6}{'success':>9}{'edit dB':>9}{'keep dB':>9}{'TFLOPs':>9}{'seconds':>9}")
    for name, row in [*result["kinds"].items(), ("all", result["mean"])]:
        print(
            f"{name:12}{row['count']:6.0f}{row['success']:9.0%}{row['edit_psnr']:9.1f}{row['keep_psnr']:9.1f}"
            f"{row['flops'] / 1e12:9.3f}{row['seconds']:9.2f}"
        )
    if args.json is not None:
        named = "" if args.model == EDITORS[0] else f" --model {args.model}"
        command = f"specedit eval micro{named} --preset {args.preset} --restore {args.restore} --cases {args.cases}"
        results.write(args.json, f"{command} --size {args.size}", result["cases"], mean=result["mean"])
    return 0


def _add_bench(commands) -> None:
    parser = commands.add_parser("bench", help="time every preset against the stock pipeline on this machine")
    _add_model(parser)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=1, help="timed calls of each; the median counts")
    parser.add_argument("--json", type=Path)
    parser.set_defaults(run=_bench)
    _add_plan(parser.add_subparsers(metavar="plan"))


def _bench(args) -> int:
    if args.repeat < 1:
        raise Failure(f"--repeat: expected at least 1, got {args.repeat}")
    _check_size(args.size, 64)
    _quiet()
    from . import bench, results

    rows = bench.presets_against_stock(args.size, args.repeat, model=args.model)
    print(f"{'preset':14}{'restore':11}{'edited':>8}{'seconds':>9}{'speedup':>9}{'FLOPs ratio':>13}{'quotient':>10}")
    for row in rows:
        quotient = row["speedup"] / row["flops_ratio"]
        print(
            f"{row['preset']:14}{row['restore']:11}{row['edit_fraction']:8.0%}{row['seconds']:9.2f}"
            f"{row['speedup']:8.2f}x{row['flops_ratio']:12.2f}x{quotient:10.2f}"
        )
    if args.json is not None:
        named = "" if args.model == EDITORS[0] else f" --model {args.model}"
        results.write(args.json, f"specedit bench{named} --size {args.size} --repeat {args.repeat}", rows)
    return 0


def _add_plan(commands) -> None:
    parser = commands.add_parser("plan", help="predict a run of a real editor on a GPU that is not at hand")
    parser.add_argument("--gpu", default="H100", help="A100, H100, H200 or B200")
    parser.add_argument("--model", default="flux-kontext", help="flux-kontext or qwen-image-edit")
    parser.add_argument("--preset", default=DEFAULT_PRESET, choices=list(presets))
    parser.add_argument("--restore", default="full", choices=CHOICES["restore"])
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--edited", type=float, default=20, help="share of the picture that is edited, in percent")
    parser.add_argument("--reference-refresh", type=int, metavar="R", help="text and reference only every R steps")
    parser.add_argument(
        "--guidance-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="sigmas at which true guidance runs"
    )
    parser.add_argument(
        "--measured", type=Path, nargs="*", default=sorted(Path("benchmarks/results").glob("end_to_end*.json")),
        help="result files to compare with, by default those in benchmarks/results",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the plan to this file")
    parser.set_defaults(run=_plan)


def _plan(args) -> int:
    _quiet()
    import json

    from . import plan
    from .config import resolve

    config = resolve(
        args.preset, restore=args.restore, reference_refresh=args.reference_refresh, guidance_range=args.guidance_range
    )
    asked = (args.model, args.height, args.width, args.edited / 100, args.gpu)
    predicted = plan.plan(config, *asked)
    row = plan.measured_row([json.loads(path.read_text()) for path in args.measured], config, *asked)
    seconds = {} if row is None else {stage["name"]: stage["seconds"] for stage in row["stages"]}
    print(
        f"{args.model}, {args.preset}, restore={args.restore}, {args.height} x {args.width}, {args.edited:g} % edited"
    )
    print(f"predicted for {args.gpu} ({plan.GPUS[args.gpu].source}): roofline, a bound from below\n")
    print(f"{'stage':10}{'steps':>6}{'tokens':>8}{'TFLOPs':>10}{'GB':>9}{'seconds':>10}{'measured':>10}")
    for s in predicted["stages"]:
        tokens = f"{s['tokens']:,}" if s["steps"] else ""
        measured = f"{seconds[s['name']]:10.3f}" if s["name"] in seconds else f"{'-':>10}"
        print(
            f"{s['name']:10}{s['steps'] or '':>6}{tokens:>8}{s['flops'] / 1e12:10.2f}{s['bytes'] / 1e9:9.1f}"
            f"{s['seconds']:10.4f}{measured}"
        )
    lines = [("predicted", predicted)] + ([] if row is None else [("measured", row | {"clock_ratio": row["speedup"]})])
    print(f"\n{'':10}{'seconds':>9}{'stock':>9}{'FLOPs ratio':>13}{'clock ratio':>13}{'quotient':>10}")
    for name, r in lines:
        print(
            f"{name:10}{r['seconds']:9.3f}{r['seconds_stock']:9.3f}{r['flops_ratio']:12.2f}x{r['clock_ratio']:12.2f}x"
            f"{r['clock_ratio'] / r['flops_ratio']:10.2f}"
        )
    if row is None:
        print("\nnot measured: no result file has this run on such a GPU")
    if args.json is not None:
        args.json.write_text(json.dumps(predicted, indent=1) + "\n")
    return 0


def _quiet() -> None:
    """Libraries' start-up chatter is not the user's concern; errors still are."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
