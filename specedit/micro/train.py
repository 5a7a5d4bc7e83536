"""Trains an embedded editor from nothing: its autoencoder, its text encoders on prompts alone, the first blocks on
questions alone, then text encoders and transformer together.

    python -m specedit.micro.train --out runs/kontext --vae-minutes 13 --text-minutes 6 --minutes 80
    python -m specedit.micro.train --model qwen --out runs/qwen --like specedit/micro/weights/kontext --minutes 0
    python -m specedit.micro.train --out runs/more --start specedit/micro/weights/kontext --minutes 8 --batch-scale 8

The second line lets a Qwen editor take over what a Kontext editor knows, for --link-minutes; with --minutes it would go
on by itself, as it does all along without --like. The last line goes on from weights that are there; with both options
autoencoder and words are --start's, and only the transformer is taken over, from a Kontext editor that has learned more
since. The budget is wall-clock time, so the same command fits a GPU and two cores. Run it again with the same --out to
go on: a larger budget continues where the last run stopped. `runs/kontext/editor` always holds the newest averaged
weights as a pipeline directory, `runs/kontext/log.json` what happened.
"""

import argparse
import json
from pathlib import Path

import torch

from . import landmarks, order
from .cpu import fast
from .family import named
from .family_kontext import KONTEXT
from .inherit import SAME, distance, inherit
from .inherit_places import lead, take_over_places
from .questions import Questions
from .train_ask import train_ask
from .train_editor import shares, train_editor
from .train_link import train_link
from .train_text import train_text
from .train_vae import train_vae
from .training import Log, Settings


def train(settings: Settings):
    """Train, or go on training, the editor in `settings.out`; returns the pipeline with averaged weights.

    Raises:
        ValueError: an unknown model or kind of edit, `enter` outside 0 to 1, one of the folders holds another one's
            editor, or `like` where it cannot serve.
    """
    family = named(settings.model)
    shares(settings.practise)  # raises before anything is made
    if not 0 <= settings.enter <= 1:
        raise ValueError(f"--enter: expected 0 to 1, got {settings.enter}")
    if settings.follow and (settings.start is None or settings.like is None):
        raise ValueError("--follow: expected --start, an editor that took over another, and --like, that other one")
    if settings.like is not None and settings.model != "qwen":
        raise ValueError(f"--like: expected --model qwen, got {settings.model}")
    for option, folder, kind in (
        ("--out", settings.out / "editor", family),
        ("--start", settings.start, family),
        ("--like", settings.like, KONTEXT),
    ):
        if folder is not None and (index := Path(folder) / "model_index.json").exists():
            held = json.loads(index.read_text())["_class_name"]
            if held != kind.pipeline.__name__:
                raise ValueError(f"{option}: expected a {kind.pipeline.__name__} in {folder}, got a {held}")
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    log = Log(settings.out / "log.json")
    teacher = None if settings.like is None else KONTEXT.load(settings.like, torch_dtype=torch.float32)
    if teacher is not None and not landmarks.placed(teacher):
        raise ValueError(f"--like: expected an editor with landmarks, got {settings.like}; train it on and it has them")
    if settings.start is None:
        pipe = family.build(settings.seed)
        train_vae(pipe, settings, log, teacher)
    else:
        pipe = family.load(settings.start, torch_dtype=torch.float32)
        if teacher is not None and (apart := distance(pipe, teacher)) > SAME:
            raise ValueError(
                "--start: expected an editor whose latents are those of --like, "
                f"got some that are apart by {apart:.2f} of their variance"
            )
    if teacher is not None:
        if not settings.follow:
            inherit(pipe, teacher)
        lead(pipe)
    questions = Questions(pipe.transformer, family.asked_blocks(pipe.transformer))
    resumed = (settings.out / "editor.pt").exists()  # has what comes beforehand behind it
    if not resumed:
        if settings.start is None:  # whoever has learned to understand its words would no longer
            train_text(pipe, settings, log)
        if teacher is not None:
            if not settings.follow and not (settings.out / "link.pt").exists():
                take_over_places(pipe, teacher)
            train_link(pipe, teacher, questions, settings, log)
    if family is KONTEXT:  # Qwen's words stand in a row, each at a place of its own
        landmarks.place(pipe)
        if order.shallow(pipe):
            if resumed:
                order.deepen(pipe)
            else:
                order.train_order(pipe, settings, log)
    if settings.minutes > 0:
        if not resumed:
            train_ask(pipe, questions, settings, log)
        train_editor(pipe, questions, settings, log)
    family.save(pipe, settings.out / "editor")
    return pipe


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=Settings.model, choices=["kontext", "qwen"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae-minutes", type=float, default=Settings.vae_minutes)
    parser.add_argument(
        "--text-minutes",
        type=float,
        default=Settings.text_minutes,
        help="text encoders alone; with --start only a block that T5 still lacks; 0: left as they are",
    )
    parser.add_argument(
        "--ask-minutes",
        type=float,
        default=Settings.ask_minutes,
        help="questions beforehand; with --start only their readings learn; 0: none",
    )
    parser.add_argument("--minutes", type=float, default=Settings.minutes)
    parser.add_argument("--seed", type=int, default=0, help="another seed sees other tasks and other noise")
    parser.add_argument("--steps", type=int, help="at most this many steps of each part")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--largest", type=int, default=Settings.largest, help="largest side trained at, in pixels")
    parser.add_argument("--rate", type=float, default=Settings.rate)
    parser.add_argument("--batch-scale", type=int, default=1, help="times the tasks of a step; a GPU has room for 8")
    parser.add_argument(
        "--start",
        type=Path,
        help="directory of an editor to go on from; its autoencoder is kept, since the latents are what it learned",
    )
    parser.add_argument(
        "--like", type=Path, help="directory of a Kontext editor whose transformer a Qwen editor takes over"
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="with both: --start's transformer is kept too, and follows --like's further",
    )
    parser.add_argument(
        "--practise", nargs="+", default=(), metavar="KIND", help="kinds of edit that half of the tasks are of"
    )
    parser.add_argument(
        "--enter", type=float, default=Settings.enter, help="with --start: where in the curriculum of sizes, 0 to 1"
    )
    parser.add_argument("--link-minutes", type=float, default=Settings.link_minutes, help="with --like")
    settings = Settings(**vars(parser.parse_args(arguments)))
    with fast(settings.device):
        train(settings)


if __name__ == "__main__":
    main()
