"""Trains an embedded editor: its autoencoder, its text encoders alone, its first blocks by linear probes, then all.

    python -m training.micro.train --out runs/kontext --vae-minutes 13 --text-minutes 6 --minutes 80
    python -m training.micro.train --model qwen --out runs/qwen --like specedit/micro/weights/kontext --minutes 0
    python -m training.micro.train --out runs/more --start specedit/micro/weights/kontext --minutes 8 --batch-scale 8

The second command initialises a Qwen editor from a Kontext editor and distils it for --link-minutes; --minutes would
train it on its own afterwards. The third continues from trained weights. With --start and --like, autoencoder and text
encoder are --start's, and the transformer is initialised from --like's.

Budgets are wall-clock time, so the same command fits a GPU and two cores. The same --out with a larger budget resumes
where the last run stopped. `runs/kontext/editor` holds the newest averaged weights as a pipeline directory,
`runs/kontext/log.json` the losses.
"""

import argparse
import json
from pathlib import Path

import torch

from . import landmarks, neighbour_block
from .cpu import fast
from .families import family_named
from .family import Family
from .family_kontext import KONTEXT
from .inherit import SAME_LATENTS, inherit_transformer, latent_distance
from .inherit_places import inherit_landmarks, prepend_tokens
from .loop import Log, Settings
from .probes import Probes
from .train_editor import shares, train_editor
from .train_link import train_link
from .train_probes import train_probes
from .train_text import train_text
from .train_vae import train_vae


def train(settings: Settings):
    """Train the editor in `settings.out`, or resume its training; returns the pipeline with averaged weights.

    Raises:
        ValueError: an unknown model or kind of edit, `enter` or `leave` outside 0 to 1, a folder with another kind of
            editor, or a `like` that does not fit.
    """
    family = family_named(settings.model)
    check(settings, family)
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    log = Log(settings.out / "log.json")
    teacher = None if settings.like is None else KONTEXT.editor.load(settings.like, torch_dtype=torch.float32)
    if teacher is not None and not landmarks.has_landmarks(teacher):
        raise ValueError(
            f"--like: expected an editor with landmarks, got {settings.like}; training it further adds them"
        )
    if settings.start is None:
        pipe = family.build(settings.seed)
        train_vae(pipe, settings, log, teacher)
    else:
        pipe = family.editor.load(settings.start, torch_dtype=torch.float32)
        if teacher is not None and (apart := latent_distance(pipe, teacher)) > SAME_LATENTS:
            raise ValueError(
                "--start: expected an editor with the latents of --like, "
                f"got latents that differ by {apart:.2f} of their variance"
            )
    if teacher is not None:
        if not settings.follow:
            inherit_transformer(pipe, teacher)
        prepend_tokens(pipe)
    probes = Probes(pipe.transformer, family.probed_blocks(pipe.transformer))
    resumed = (settings.out / "editor.pt").exists()  # the parts before are done
    if not resumed:
        if settings.start is None:  # trained alone, a trained editor's encoders would drift
            train_text(pipe, settings, log)
        if teacher is not None:
            if not settings.follow and not (settings.out / "link.pt").exists():
                inherit_landmarks(pipe, teacher)
            train_link(pipe, teacher, probes, settings, log)
    if family is KONTEXT:  # Qwen's text tokens have positions of their own
        landmarks.add_landmarks(pipe)
        if neighbour_block.lacks_neighbour_block(pipe):
            if resumed:
                neighbour_block.add_neighbour_block(pipe)
            else:
                neighbour_block.train_neighbour_block(pipe, settings, log)
    if settings.minutes > 0:
        if not resumed and not settings.without_probes:
            train_probes(pipe, probes, settings, log)
        train_editor(pipe, None if settings.without_probes else probes, settings, log)
    family.save(pipe, settings.out / "editor")
    return pipe


def check(settings: Settings, family: Family) -> None:
    """Raise before anything is built: the errors that `train` lists, but for weights that do not fit."""
    shares(settings.practise)
    if not 0 <= settings.enter <= 1:
        raise ValueError(f"--enter: expected 0 to 1, got {settings.enter}")
    entered = 0.0 if settings.start is None else settings.enter
    if not entered <= settings.leave <= 1:
        raise ValueError(f"--leave: expected {entered:g}, where the curriculum is entered, to 1, got {settings.leave}")
    if not settings.batch_scale > 0:
        raise ValueError(f"--batch-scale: expected more than 0, got {settings.batch_scale}")
    if settings.follow and (settings.start is None or settings.like is None):
        raise ValueError(
            "--follow: expected --start, an editor that inherited from another, and --like, that other one"
        )
    if settings.like is not None and settings.model != "qwen":
        raise ValueError(f"--like: expected --model qwen, got {settings.model}")
    for option, folder, kind in (
        ("--out", settings.out / "editor", family),
        ("--start", settings.start, family),
        ("--like", settings.like, KONTEXT),
    ):
        if folder is not None and (index := Path(folder) / "model_index.json").exists():
            held = json.loads(index.read_text())["_class_name"]
            if held != kind.editor.pipeline.__name__:
                raise ValueError(f"{option}: expected a {kind.editor.pipeline.__name__} in {folder}, got a {held}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="training.micro.train", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=Settings.model, choices=["kontext", "qwen"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae-minutes", type=float, default=Settings.vae_minutes)
    parser.add_argument(
        "--text-minutes",
        type=float,
        default=Settings.text_minutes,
        help="text encoders alone; with --start only the neighbour block, if T5 lacks it; 0: not at all",
    )
    parser.add_argument(
        "--probe-minutes",
        type=float,
        default=Settings.probe_minutes,
        help="first blocks by linear probes; with --start the probes are fitted first; 0: not at all",
    )
    parser.add_argument("--without-probes", action="store_true", help="train by flow matching alone")
    parser.add_argument("--minutes", type=float, default=Settings.minutes)
    parser.add_argument("--seed", type=int, default=0, help="of tasks and noise")
    parser.add_argument("--steps", type=int, help="at most this many steps of each part")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--largest", type=int, default=Settings.largest, help="largest side trained at, in pixels")
    parser.add_argument("--rate", type=float, default=Settings.rate)
    parser.add_argument("--batch-scale", type=float, default=1, help="multiplies the batch size; a GPU has room for 8")
    parser.add_argument(
        "--start",
        type=Path,
        help="directory of an editor to continue from; its autoencoder is kept",
    )
    parser.add_argument(
        "--like", type=Path, help="directory of a Kontext editor to initialise a Qwen editor from and to distil"
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="with both: --start's transformer is kept, and only distillation from --like goes on",
    )
    parser.add_argument("--practise", nargs="+", default=(), metavar="KIND", help="kinds of edit of half of the tasks")
    parser.add_argument(
        "--enter",
        type=float,
        default=Settings.enter,
        help="with --start: where in the curriculum of sizes to begin, 0 to 1",
    )
    parser.add_argument(
        "--leave", type=float, default=Settings.leave, help="where in the curriculum of sizes to end, up to 1"
    )
    parser.add_argument("--link-minutes", type=float, default=Settings.link_minutes, help="distillation, with --like")
    settings = Settings(**vars(parser.parse_args(arguments)))
    with fast(settings.device):
        train(settings)


if __name__ == "__main__":
    main()
