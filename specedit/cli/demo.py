"""`specedit demo`."""

from __future__ import annotations

from pathlib import Path

from ..config import CHOICES, presets
from ..io.files import check_folder, replacing
from .bounds import check_size, seed_number
from .shared import add_model, silence_libraries


def add(commands) -> None:
    parser = commands.add_parser("demo", help="edit one photograph twice, stock and with SpecEdit; no GPU, no network")
    add_model(parser)
    parser.add_argument("--out", type=Path, default=Path("specedit-demo"), help="folder for the pictures")
    parser.add_argument("--size", type=int, default=512, help="side in pixels, 128 to 512")
    parser.add_argument("--preset", default="turbo", choices=list(presets))
    parser.add_argument("--restore", default="reference", choices=CHOICES["restore"])
    parser.add_argument("--seed", type=seed_number, help="seed of another task")
    parser.set_defaults(run=run)


def run(args) -> int:
    check_size(args.size, 128, 512)
    check_folder("--out", args.out)
    silence_libraries()
    from ..io import pictures
    from ..micro import demonstration as demo

    seed = demo.SEED if args.seed is None else args.seed
    keep = args.restore == "reference"
    result = demo.run(args.size, args.preset, seed, args.model, restore=args.restore, keep_pixels=keep)
    for name, image in (("input", result.case.source), ("stock", result.stock), ("specedit", result.edit)):
        pictures.write(image, args.out / f"{name}.png")
    for name, figure in (("demo", result), ("report", result.run)):
        with replacing(args.out / f"{name}.png") as part:
            figure.save_figure(part)
    how = f"preset {args.preset}, restore={args.restore}" + (", keep_pixels=True" if keep else "")
    print(f'\n"{result.case.prompt}", {args.size} x {args.size} px, {how}\n')
    print(result.table())
    print(f"\n{result.run}\n\npictures in {args.out}: demo.png, report.png, input.png, stock.png, specedit.png")
    return 0
