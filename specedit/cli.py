"""The command line: `specedit demo | edit | eval | bench`."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NoReturn

from . import pipelines
from .config import CHOICES, DEFAULT_PRESET, presets
from .pipelines import EDITORS


class Failure(Exception):
    """An error that the user can do something about: one line, exit code 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse itself prints the usage too, which takes several lines
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args=None, namespace=None):
        """Of a command's parser too: what it does not know is an error that names the command, not `specedit`."""
        found, unknown = super().parse_known_args(args, namespace)
        return (found, unknown) if not unknown else self.error(f"unrecognized arguments: {' '.join(unknown)}")


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
        first = "--offload, " if hasattr(args, "offload") else ""
        print(f"specedit: out of memory; {first}a smaller picture or model takes less", file=sys.stderr)
        return 2


def _check_size(size: int, low: int, high: int | None = None) -> None:
    if size < low or size % 16 or (high is not None and size > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise Failure(f"--size: expected a multiple of 16 {limits}, got {size}")


def _seed(text: str) -> int:
    """What torch's generators take."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^63 - 1, got {text}")
    return int(text)


def _check_output(path: Path, kinds: Collection[str]) -> None:
    """Before any work: whether a picture can be written to `path`. `kinds`: suffixes with their dot."""
    if path.suffix.lower() not in kinds:
        raise Failure(f"expected a picture file such as {path.stem}.png, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)


def _add_model(parser) -> None:
    parser.add_argument("--model", default=EDITORS[0], choices=EDITORS, help="which embedded editor")


def _add_offload(parser) -> None:
    parser.add_argument(
        "--offload", action="store_true", help="only the part that runs is on the GPU, for models that it does not hold"
    )


def _add_demo(commands) -> None:
    parser = commands.add_parser("demo", help="edit one photograph twice, stock and with SpecEdit; no GPU, no network")
    _add_model(parser)
    parser.add_argument("--out", type=Path, default=Path("specedit-demo"), help="folder for the pictures")
    parser.add_argument("--size", type=int, default=512, help="side in pixels, 128 to 512")
    parser.add_argument("--preset", default="turbo", choices=list(presets))
    parser.add_argument("--restore", default="reference", choices=CHOICES["restore"])
    parser.add_argument("--seed", type=_seed, help="another task")
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
    how = f"preset {args.preset}, restore={args.restore}" + (", keep_pixels=True" if keep else "")
    print(f'\n"{result.case.prompt}", {args.size} x {args.size} px, {how}\n')
    print(result.table())
    print(f"\n{result.run}\n\npictures in {args.out}: demo.png, report.png, input.png, stock.png, specedit.png")
    return 0


def _add_edit(commands) -> None:
    parser = commands.add_parser("edit", help="edit a picture with any supported pipeline")
    parser.add_argument("image", type=Path)
    parser.add_argument("prompt")
    parser.add_argument(
        "--model", help=f"hub id or directory of a pipeline, or an embedded editor: {', '.join(EDITORS)} (default: the "
        "embedded kontext, which only knows coloured shapes)"
    )  # fmt: skip
    _add_offload(parser)
    parser.add_argument("--negative-prompt", help="what to keep away from; Qwen's guidance needs one, if only a space")
    parser.add_argument("--preset", default=DEFAULT_PRESET, choices=list(presets), help=f"default: {DEFAULT_PRESET}")
    parser.add_argument("--out", type=Path, default=Path("edit.png"), help="picture to write (default: edit.png)")
    parser.add_argument("--mask", type=Path, help="picture that is nonzero where to edit; instead of the draft")
    parser.add_argument("--restore", choices=CHOICES["restore"])
    parser.add_argument(
        "--keep-pixels", action="store_true", help="outside the edit, the input's own pixels (at the output's size)"
    )
    parser.add_argument("--seed", type=_seed, default=0)
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
    image = pipelines.read(args.image).convert("RGB")
    mask = None if args.mask is None else pipelines.read(args.mask)
    pipe, prepare = pipelines.load(args.model, offload=args.offload)
    if args.model is None:
        print(f"editing with the embedded {EDITORS[0]} editor, which only knows coloured shapes; --model takes others")
    size, (image, given) = image.size, prepare(image)
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
    resized = f", {result.width} x {result.height} px of {size[0]} x {size[1]}" if result.size != size else ""
    print(f"wrote {args.out}{resized}")
    return 0


def _add_eval(commands) -> None:
    parser = commands.add_parser("eval", help="score a preset on the embedded tasks, or run it over a public benchmark")
    kinds = parser.add_subparsers(dest="what", required=True, metavar="micro|gedit|imgedit")
    micro = kinds.add_parser("micro", help="tasks with exact results, on an embedded editor")
    _add_model(micro)
    micro.add_argument("--cases", type=int, default=16)
    micro.add_argument("--size", type=int, default=512)
    micro.set_defaults(run=_eval)
    for name, title, data in (
        ("gedit", "GEdit-Bench", "download of the dataset stepfun-ai/GEdit-Bench, its parquet files"),
        ("imgedit", "ImgEdit-Bench", "download of PKU-YuanGroup/ImgEdit's basic suite: its list and pictures"),
    ):
        about = (
            f"run a pipeline over a local copy of {title}, and write the pictures where its own scorer looks for them"
        )
        scores = "Its scores come from a vision-language model over the network, which is not called here."
        public = kinds.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}. {scores}")
        public.add_argument("--data", type=Path, required=True, help=data)
        public.add_argument(
            "--model", required=True, help="hub id or directory of a pipeline, or an embedded editor: kontext, qwen"
        )
        _add_offload(public)
        public.add_argument("--negative-prompt", help="of every task; Qwen's guidance needs one, if only a space")
        public.add_argument(
            "--out", type=Path, help=f"folder, by default specedit-{name}/PRESET; goes on with the run that is in it"
        )
        public.add_argument("--cases", type=int, help="only the first so many tasks")
        public.add_argument("--seed", type=_seed, default=0, help="of every task's noise")
        public.add_argument(
            "--against", type=Path, help="folder of an earlier run, of stock for instance, to compare pictures with"
        )
        public.set_defaults(run=_eval_public)
    kinds.choices["gedit"].add_argument(
        "--language", default="en", choices=["en", "cn", "all"], help="of the instructions"
    )
    for each in kinds.choices.values():
        each.add_argument("--preset", default=DEFAULT_PRESET, choices=[*presets, "stock"])
        each.add_argument("--restore", choices=CHOICES["restore"], help="instead of the preset's; not with stock")
        each.add_argument("--steps", type=int, help="model evaluations, instead of the preset's (stock: 50)")
        each.add_argument("--json", type=Path, help="also write means and rows to this file")


def _check_eval(args) -> dict[str, str]:
    """Errors that need no data; the preset's overrides."""
    for name in ("cases", "steps"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise Failure(f"--{name}: expected at least 1, got {value}")
    if args.preset == "stock" and args.restore is not None:
        raise Failure(f"--restore: expected none with --preset stock, which restores nothing, got {args.restore}")
    return {} if args.restore is None else {"restore": args.restore}


def _eval(args) -> int:
    overrides = _check_eval(args)
    _check_size(args.size, 64)
    _quiet()
    from tqdm.auto import tqdm

    from . import install, micro, results

    pipe, _ = pipelines.load(args.model)
    pipe.set_progress_bar_config(disable=True)
    if args.preset != "stock":
        install(pipe, args.preset, **overrides)
    cases = (micro.scenes.sample(seed, args.size) for seed in range(args.cases))
    result = micro.evaluate(pipe, tqdm(cases, total=args.cases, desc=args.preset), args.steps)
    print(f"{'':12}{'tasks':>6}{'success':>9}{'edit dB':>9}{'keep dB':>9}{'TFLOPs':>9}{'seconds':>9}")
    for name, row in [*result["kinds"].items(), ("all", result["mean"])]:
        print(
            f"{name:12}{row['count']:6.0f}{row['success']:9.0%}{row['edit_psnr']:9.1f}{row['keep_psnr']:9.1f}"
            f"{row['flops'] / 1e12:9.3f}{row['seconds']:9.2f}"
        )
    if args.json is not None:
        results.write(args.json, _command(args), result["cases"], mean=result["mean"])
    return 0


def _eval_public(args) -> int:
    overrides = _check_eval(args)
    _quiet()
    from tqdm.auto import tqdm

    from . import evaluation, install, results, tasks
    from .config import STOCK_STEPS, resolve

    stock = args.preset == "stock"
    todo = tasks.gedit(args.data, args.language) if args.what == "gedit" else tasks.imgedit(args.data)
    todo = todo[: args.cases]
    out = args.out or Path(f"specedit-{args.what}") / args.preset
    settings = {
        "benchmark": args.what,
        "model": args.model,
        "preset": args.preset,
        "restore": None if stock else resolve(args.preset, **overrides).restore,
        "steps": STOCK_STEPS if stock and args.steps is None else args.steps,
        "seed": args.seed,
        "negative_prompt": args.negative_prompt,
    }
    against = None if args.against is None else evaluation.check_against(todo, args.against)
    evaluation.begin(out, settings)
    pipe, prepare = pipelines.load(args.model, own_size=False, offload=args.offload)
    pipe.set_progress_bar_config(disable=True)
    if not stock:
        install(pipe, args.preset, **overrides)
    call = {} if args.negative_prompt is None else {"negative_prompt": args.negative_prompt}
    rows = evaluation.run(
        pipe, prepare, tqdm(todo, desc=args.preset), out, steps=args.steps, seed=args.seed, against=args.against, **call
    )
    mean, kinds = evaluation.means(rows)
    print(evaluation.table(mean, kinds))
    if not stock and (count := sum(not row["accelerated"] for row in rows)):
        print(f"{count} of {len(rows)} ran the stock pipeline, with its own number of steps unless --steps says one")
    print(f"pictures in {out}, for the scorer of the benchmark")
    if args.json is not None:
        more = {} if against is None else {"against": against}
        results.write(args.json, _command(args), rows, mean=mean, kinds=kinds, settings=settings, **more)
    return 0


def _command(args) -> str:
    """What to type for the same results."""
    words = ["specedit", "eval", args.what]
    for name, value in vars(args).items():
        if name not in ("command", "what", "run", "out", "json") and value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(words)


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
    if not 0 <= args.edited <= 100:
        raise Failure(f"--edited: expected percent, from 0 to 100, got {args.edited:g}")
    files = [json.loads(path.read_text()) for path in args.measured]
    for path, content in zip(args.measured, files, strict=True):
        if not isinstance(content, dict) or not {"machine", "rows"} <= content.keys():
            raise Failure(f"--measured: expected a result file with machine and rows, got {path}")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    predicted = plan.plan(config, *asked)
    row = plan.measured_row(files, config, *asked)
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
