"""`specedit edit`."""

from __future__ import annotations

import sys
from pathlib import Path

from .. import pipelines
from ..config import CHOICES, DEFAULT_PRESET, presets
from ..pipelines import EDITORS
from .shared import Failure, add_guidance, add_offload, attention_here, check_output, guidance, quiet, seed_number


def add(commands) -> None:
    parser = commands.add_parser("edit", help="edit a picture with any supported pipeline")
    parser.add_argument("image", type=Path)
    parser.add_argument("prompt")
    parser.add_argument(
        "--model", help=f"hub id or directory of a pipeline, or an embedded editor: {', '.join(EDITORS)} (default: the "
        "embedded kontext, which only knows coloured shapes)"
    )  # fmt: skip
    add_offload(parser)
    add_guidance(parser)
    parser.add_argument("--preset", default=DEFAULT_PRESET, choices=list(presets), help=f"default: {DEFAULT_PRESET}")
    parser.add_argument("--out", type=Path, default=Path("edit.png"), help="picture to write (default: edit.png)")
    parser.add_argument("--mask", type=Path, help="picture that is nonzero where to edit; instead of the draft")
    parser.add_argument("--restore", choices=CHOICES["restore"])
    parser.add_argument(
        "--keep-pixels", action="store_true", help="outside the edit, the input's own pixels (at the output's size)"
    )
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--figure", type=Path, help="also write where the method looked and what it cost")
    parser.set_defaults(run=run)


def run(args) -> int:
    if not args.image.is_file():
        raise Failure(f"image: expected a picture file, got {args.image}, which does not exist")
    if not args.prompt.strip():
        raise Failure("prompt: expected what to change, got an empty text")
    quiet()
    import torch
    from matplotlib.backend_bases import FigureCanvasBase
    from PIL import Image

    from .. import install
    from ..install import last_report

    check_output(args.out, [suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE])
    if args.figure is not None:
        check_output(args.figure, [f".{kind}" for kind in FigureCanvasBase.get_supported_filetypes()])
    image = pipelines.read(args.image).convert("RGB")
    mask = None if args.mask is None else pipelines.read(args.mask)
    pipe, prepare = pipelines.load(args.model, offload=args.offload)
    if args.model is None:
        print(f"editing with the embedded {EDITORS[0]} editor, which only knows coloured shapes; --model takes others")
    size, (image, given) = image.size, prepare(image)
    given |= guidance(pipe, args)
    overrides = attention_here() | ({} if args.restore is None else {"restore": args.restore})
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
