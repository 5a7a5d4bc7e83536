"""`specedit edit`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import pipelines
from ..config import CHOICES, DEFAULT_PRESET, presets, resolve
from ..field_checks import MAX_SCORE
from ..io.files import replacing
from ..micro import words
from ..pipelines import EDITORS, arguments, loading
from .bounds import SCALE, STEPS, check_numbers, seed_number
from .errors import CLIError
from .outputs import check_files, check_formats
from .shared import add_guidance, add_offload, attention_here, guidance, option, silence_libraries

SIDES = (64, 4096)  # px; the embedded editors take 512 at most


def add(commands) -> None:
    parser = commands.add_parser(
        "edit",
        help="edit a picture with any supported pipeline",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"The embedded editors understand these sentences, and refuse others:\n{words.help_text()}",
    )
    parser.add_argument("image", type=Path)
    parser.add_argument("prompt")
    parser.add_argument(
        "--model", help=f"hub id or directory of a pipeline, or an embedded editor: {', '.join(EDITORS)} (default: the "
        "embedded kontext, which only knows coloured shapes)"
    )  # fmt: skip
    add_offload(parser)
    add_guidance(parser)
    parser.add_argument("--preset", default=DEFAULT_PRESET, choices=list(presets), help=f"default: {DEFAULT_PRESET}")
    parser.add_argument("--steps", type=int, metavar="N", help="model evaluations, in the preset's proportions")
    parser.add_argument(
        "--threshold", type=float, metavar="T", help=f"score above which a cell is edited, 0 to {MAX_SCORE:g}; lower "
        "edits more (default: the preset's)"
    )  # fmt: skip
    parser.add_argument(
        "--size", type=int, metavar="N", help="edit at N pixels on the longer side at most; not with pipelines that "
        "choose their own size"
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("edit.png"), help="picture to write (default: edit.png)")
    parser.add_argument("--mask", type=Path, help="picture that is nonzero where to edit; replaces the draft")
    parser.add_argument("--restore", choices=CHOICES["restore"])
    parser.add_argument(
        "--keep-pixels", action="store_true", help="outside the edit, the input's own pixels (at the output's size)"
    )
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--figure", type=Path, help="also write a figure of the edited cells and the cost")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="also write one picture: before | after | edited cells"
    )
    parser.set_defaults(run=run)


def run(args) -> int:
    prompt, config = _check(args)
    silence_libraries()
    from ..api.installing import install, last_report
    from ..io import pictures

    check_formats(args.out, args.figure, args.compare)
    picture = pictures.read(args.image)
    mask, notes = (None, ()) if args.mask is None else pictures.read_mask(args.mask)
    _tell(*picture.notes, *notes)
    pipe, prepare = pipelines.load(args.model, offload=args.offload)
    if args.model is None:
        print(f"editing with the embedded {EDITORS[0]} editor, which only knows coloured shapes; --model takes others")
    image, given = arguments.sized(picture.image, pipe, prepare, args.size, option)
    given |= guidance(pipe, args) | ({} if args.steps is None else {"num_inference_steps": args.steps})
    import torch

    install(pipe, config, **attention_here())
    generator = torch.Generator().manual_seed(args.seed)
    result = pipe(image=image, prompt=prompt, edit_mask=mask, generator=generator, **given).images[0]
    _tell(*pictures.write(result, args.out, alpha=picture.alpha))
    if (done := last_report(pipe)) is not None:
        print(done)
    _extras(args, image, result, done)
    size = picture.image.size
    resized = f", {result.width} x {result.height} px of {size[0]} x {size[1]}" if result.size != size else ""
    print(f"wrote {args.out}{resized}")
    return 0


def _check(args) -> tuple[str, Any]:
    """Check everything that needs neither torch nor a pipeline; returns prompt and configuration."""
    if not args.prompt.strip():
        raise CLIError("prompt: expected what to change, got an empty text")
    embedded = args.model is None or args.model in EDITORS
    check_numbers(args, steps=STEPS, threshold=(0, MAX_SCORE), size=SIDES, true_cfg_scale=SCALE)
    check_files(args.image, args.mask, args.out, args.figure, args.compare)
    names = ("restore", "threshold")
    overrides = {name: value for name in names if (value := getattr(args, name)) is not None}
    config = resolve(args.preset, keep_pixels=args.keep_pixels, **overrides)
    if args.steps is not None:
        config.with_steps(args.steps)  # rejects too few
    if not embedded:
        silence_libraries()
        loading.check_model(args.model, EDITORS)
        loading.check_supported(args.model)
        embedded = loading.embedded_editor(args.model) is not None
    if not embedded:
        return args.prompt, config
    prompt, notes = words.understood(args.prompt)
    _tell(*notes)
    if prompt != args.prompt.strip():
        print(f'the editor is asked to "{prompt}"')
    return prompt, config


def _extras(args, image: Any, result: Any, done: Any) -> None:
    """Write the figure and the comparison, if requested."""
    if args.figure is not None and done is None:
        _tell(f"no {args.figure}, because the stock pipeline ran")
    elif args.figure is not None:
        with replacing(args.figure) as part:
            done.save_figure(part)
        print(f"wrote {args.figure}, edited cells and cost")
    if args.compare is not None:
        from .. import report_comparison as compare
        from ..io import pictures

        pictures.write(compare.side_by_side(image, result, done), args.compare)
        print(f"wrote {args.compare}, before | after{'' if done is None else ' | edited cells'}")


def _tell(*notes: str) -> None:
    for note in notes:
        print(f"specedit: {note}", file=sys.stderr)
