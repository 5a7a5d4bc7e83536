"""`specedit eval micro | gedit | imgedit`."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from .. import pipelines
from ..config import CHOICES, DEFAULT_PRESET, presets, resolve
from ..io.files import check_folder, check_writable
from ..pipelines import EDITORS, loading
from . import methods
from .bounds import CASES, LARGEST_EMBEDDED, SCALE, STEPS, check_numbers, check_size, seed_number
from .errors import CLIError
from .shared import add_guidance, add_model, add_offload, attention_here, guidance, silence_libraries

_COLUMNS = (  # of `eval micro`: key, heading, factor, format
    ("success", "success", 1, "{:.0%}"),
    ("edit_psnr", "edit dB", 1, "{:.1f}"),
    ("texture_distance", "texture", 1, "{:.2f}"),
    ("material", "material", 1, "{:.0%}"),
    ("seam", "seam", 1, "{:.2f}"),
    ("keep_psnr", "keep dB", 1, "{:.1f}"),
    ("flops", "TFLOPs", 1e-12, "{:.3f}"),
    ("seconds", "seconds", 1, "{:.2f}"),
)


def add(commands) -> None:
    parser = commands.add_parser("eval", help="score a preset on the embedded tasks, or run it on a public benchmark")
    kinds = parser.add_subparsers(dest="what", required=True, metavar="micro|gedit|imgedit")
    micro = kinds.add_parser("micro", help="tasks with exact results, and textures, on an embedded editor")
    add_model(micro)
    micro.add_argument("--cases", type=int, default=16, help="how many tasks, default 16")
    micro.add_argument(
        "--textures", type=int, help="how many textures besides, default a quarter of --cases; they are judged by the "
        "distribution of fresh ones, of which 1.0 is the mean"
    )  # fmt: skip
    micro.add_argument("--size", type=int, default=512, help=f"side in pixels, 64 to {LARGEST_EMBEDDED}, default 512")
    micro.set_defaults(run=_micro)
    for name, title, data in (
        ("gedit", "GEdit-Bench", "download of the dataset stepfun-ai/GEdit-Bench, its parquet files"),
        ("imgedit", "ImgEdit-Bench", "download of PKU-YuanGroup/ImgEdit's basic suite: its list and pictures"),
    ):
        about = f"run a pipeline on a local copy of {title}, and write the pictures where its own scorer expects them"
        scores = "Its scores come from a vision-language model over the network, which is not called here."
        public = kinds.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}. {scores}")
        public.add_argument("--data", type=Path, required=True, help=data)
        public.add_argument(
            "--model", required=True, help="hub id or directory of a pipeline, or an embedded editor: kontext, qwen"
        )
        add_offload(public)
        add_guidance(public)
        public.add_argument(
            "--out",
            type=Path,
            help=f"folder, by default specedit-{name}/PRESET or METHOD; an unfinished run in it is resumed",
        )
        public.add_argument("--cases", type=int, help="only the first N tasks")
        public.add_argument("--seed", type=seed_number, default=0, help="seed of every task's noise")
        public.add_argument(
            "--against", type=Path, help="folder of an earlier run, such as stock's, to compare pictures with"
        )
        public.set_defaults(run=_public)
    kinds.choices["gedit"].add_argument(
        "--language", default="en", choices=["en", "cn", "all"], help="language of the instructions"
    )
    for each in kinds.choices.values():
        each.add_argument("--preset", default=DEFAULT_PRESET, choices=[*presets, "stock"])
        each.add_argument("--restore", choices=CHOICES["restore"], help="instead of the preset's; not with stock")
        methods.add_method(each)
        each.add_argument("--steps", type=int, help="model evaluations, instead of the preset's (stock: 50)")
        each.add_argument("--json", type=Path, help="also write means and rows to this file")


def _check(args) -> dict[str, Any]:
    """Check the options that need no data; returns the preset's overrides."""
    check_numbers(args, cases=CASES, steps=STEPS)
    if args.preset == "stock" and args.restore is not None:
        raise CLIError(f"--restore: expected none with --preset stock, which restores nothing, got {args.restore}")
    if args.json is not None:
        check_writable("--json", args.json)
    overrides = methods.overrides(args) | ({} if args.restore is None else {"restore": args.restore})
    if args.preset != "stock":
        config = resolve(args.preset, **overrides)
        if args.steps is not None:
            config.with_steps(args.steps)  # rejects too few
    return overrides


def _micro(args) -> int:
    overrides = _check(args)
    check_numbers(args, textures=(0, CASES[1]))
    check_size(args.size, 64, LARGEST_EMBEDDED)
    silence_libraries()
    from tqdm.auto import tqdm

    from .. import micro
    from ..api.installing import install
    from ..evaluation import results
    from ..micro.evaluation import tasks, textures_beside

    pipe, _ = pipelines.load(args.model)
    pipe.set_progress_bar_config(disable=True)
    if args.preset != "stock":
        install(pipe, args.preset, **overrides, **attention_here())
    textures = textures_beside(args.cases, args.textures)
    cases = tqdm(tasks(args.cases, textures, args.size), total=args.cases + textures, desc=methods.named(args))
    result = micro.evaluate(pipe, cases, args.steps)
    print(f"{'':12}{'tasks':>6}" + "".join(f"{heading:>9}" for _, heading, *_ in _COLUMNS))
    for name, row in [*result["kinds"].items(), ("all", result["mean"])]:
        cells = (_cell(row.get(key, math.nan) * scale, form) for key, _, scale, form in _COLUMNS)
        print(f"{name:12}{row['count']:6.0f}" + "".join(f"{cell:>9}" for cell in cells))
    if args.json is not None:
        results.write(args.json, _command(args), result["cases"], mean=result["mean"])
        print(f"wrote {args.json}")
    return 0


def _cell(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)


def _public(args) -> int:
    overrides = _check(args)
    check_numbers(args, true_cfg_scale=SCALE)
    out = args.out or Path(f"specedit-{args.what}") / methods.named(args)
    check_folder("--out", out)
    silence_libraries()
    if args.model not in EDITORS:
        loading.check_model(args.model, EDITORS)
        if args.preset != "stock":
            loading.check_supported(args.model)
    from tqdm.auto import tqdm

    from ..api.installing import install
    from ..config import STOCK_STEPS
    from ..evaluation import results, tasks
    from ..evaluation import runs as evaluation

    stock = args.preset == "stock"
    todo = tasks.gedit(args.data, args.language) if args.what == "gedit" else tasks.imgedit(args.data)
    todo = todo[: args.cases]
    settings = {
        "benchmark": args.what,
        "model": args.model,
        "preset": args.preset,
        "restore": None if stock or "method" in overrides else resolve(args.preset, **overrides).restore,
        "steps": STOCK_STEPS if stock and args.steps is None else args.steps,
        "seed": args.seed,
        "negative_prompt": args.negative_prompt,
        # Omitted if unset, so that runs from before this option can be resumed.
        **({} if args.true_cfg_scale is None else {"true_cfg_scale": args.true_cfg_scale}),
        **({} if "method" not in overrides else {"method": methods.named(args)}),
    }
    against = None if args.against is None else evaluation.check_against(todo, args.against)
    evaluation.begin(out, settings)
    pipe, prepare = pipelines.load(args.model, offload=args.offload)
    call = guidance(pipe, args)
    pipe.set_progress_bar_config(disable=True)
    if not stock:
        install(pipe, args.preset, **overrides, **attention_here())
    rows = evaluation.run(
        pipe,
        prepare,
        tqdm(todo, desc=methods.named(args)),
        out,
        steps=args.steps,
        seed=args.seed,
        against=args.against,
        **call,
    )
    mean, kinds = evaluation.means(rows)
    print(evaluation.table(mean, kinds))
    if not stock and (count := sum(not row["accelerated"] for row in rows)):
        print(f"{count} of {len(rows)} ran the stock pipeline, with its own number of steps unless --steps says one")
    print(f"pictures in {out}, for the scorer of the benchmark")
    if args.json is not None:
        more = {} if against is None else {"against": against}
        results.write(args.json, _command(args), rows, mean=mean, kinds=kinds, settings=settings, **more)
        print(f"wrote {args.json}")
    return 0


def _command(args) -> str:
    """The command line that reproduces the results."""
    words = ["specedit", "eval", args.what]
    for name, value in vars(args).items():
        if name not in ("command", "what", "run", "out", "json") and value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(words)
