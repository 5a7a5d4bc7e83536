"""`specedit app`."""

from __future__ import annotations

import threading

from ..pipelines import EDITORS
from .bounds import check_numbers
from .errors import CLIError
from .shared import add_offload, silence_libraries

PORTS = (1024, 65535)
MEGABYTES, MEGAPIXELS = (0.001, 1000), (0.004, 1000)


def add(commands) -> None:
    parser = commands.add_parser(
        "app",
        help="edit in the browser: a page on this machine, for this machine",
        epilog='It listens on 127.0.0.1 alone and needs no network. pip install "specedit[app]"',
    )
    parser.add_argument(
        "--model", metavar="ID_OR_FOLDER", help="hub id or folder of a pipeline, besides the embedded editors "
        f"{' and '.join(EDITORS)}"
    )  # fmt: skip
    add_offload(parser)
    parser.add_argument("--port", type=int, metavar="N", help="default: the first free one from 7860 on")
    parser.add_argument("--max-mb", type=float, default=32, metavar="MB", help="largest file, default 32")
    parser.add_argument("--max-megapixels", type=float, default=40, metavar="N", help="largest picture, default 40")
    parser.add_argument("--open", action="store_true", help="also open the page in the browser")
    parser.set_defaults(run=run)


def run(args) -> int:
    check_numbers(args, port=PORTS, max_mb=MEGABYTES, max_megapixels=MEGAPIXELS)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise CLIError(f'app: expected Gradio, got none ({error}); pip install "specedit[app]"') from error
    silence_libraries()
    from ..app.server import serving
    from ..app.uploads import MB, MEGAPIXEL, Limits

    limits = Limits(round(args.max_mb * MB), round(args.max_megapixels * MEGAPIXEL))
    with serving(args.model, offload=args.offload, port=args.port, limits=limits) as address:
        print(f"SpecEdit is at {address} (Ctrl-C ends it)", flush=True)
        if args.open:
            import webbrowser

            webbrowser.open(address)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("ended")
    return 0
