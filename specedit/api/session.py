"""Edit after edit on one picture, with undo: `Session`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Unpack, get_args

from PIL import Image

from ..config import SpecEditConfig
from ..models import adapter_of
from ..overrides import Overrides
from ..run_report import RunReport
from .installation import Installation, installation_of
from .installing import install, not_supported
from .sizes import size_for

On = Literal["last", "original"]
# Arguments of the pipeline's call that a session gives itself, or that would make something else than one picture.
OWN = ("image", "prompt", "output_type", "return_dict", "num_images_per_prompt")
SETTLING = 8  # a size rule has been seen to need two rounds


@dataclass(frozen=True)
class Edit:
    """One edit of a session: its prompt, what it was made on, the picture, and the report (None if it ran stock)."""

    prompt: str
    on: On
    picture: Image.Image
    report: RunReport | None


@dataclass(frozen=True)
class _History:
    """All edits, the first `done` of which are in effect; the others have been undone."""

    edits: tuple[Edit, ...] = ()
    done: int = 0


class Session:
    """Interactive work on one picture: edit after edit, each on the last result or on the original, with undo and redo.

        session = specedit.Session(pipe, picture)
        session.edit("make the car red")
        session.edit("remove the tree")
        session.undo()

    Encodings are reused as with `reuse_encodings`, so an edit only encodes what the session has not seen. Every edit
    runs at the size at which the model takes the picture, so a later one resizes nothing. With `keep_pixels`, pixels
    that no edit has touched stay the original's, bit for bit. Use a session from one thread at a time.

    Args:
        pipe: a pipeline that `install` takes. One without SpecEdit gets it, with `keep_pixels` and `reuse_encodings`;
            an installed one keeps its configuration, unless another is given here.
        picture: RGB PIL image.
        config, overrides: as for `install`.

    Attributes:
        original: the picture, resized if the model would resize its own output once more.
        pipe: the pipeline.

    Raises:
        TypeError, ValueError: a picture that cannot be edited, or as `install`. The pipeline stays as it was.
    """

    def __init__(
        self,
        pipe: Any,
        picture: Image.Image,
        config: str | SpecEditConfig | None = None,
        **overrides: Unpack[Overrides],
    ):
        if not isinstance(picture, Image.Image):
            raise TypeError(f"picture: expected a PIL image, got {type(picture).__name__}")
        if picture.mode != "RGB":
            raise ValueError(f"picture: expected an RGB picture, got mode {picture.mode!r}; use convert('RGB')")
        if adapter_of(pipe) is None:
            raise TypeError(not_supported(pipe))
        self.original = settled(pipe, picture)
        if installation_of(pipe) is None or config is not None or overrides:
            defaults = Overrides(keep_pixels=True, reuse_encodings=True)
            install(pipe, config, **(overrides if isinstance(config, SpecEditConfig) else {**defaults, **overrides}))
        self.pipe = pipe
        self._history = _History()

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits in effect, the first one first."""
        return self._history.edits[: self._history.done]

    @property
    def picture(self) -> Image.Image:
        """The last result, or the original before the first edit."""
        return self.edits[-1].picture if self.edits else self.original

    @property
    def report(self) -> RunReport | None:
        """The report of the edit that made `picture`; None before the first edit, and of an edit that ran stock."""
        return self.edits[-1].report if self.edits else None

    def edit(self, prompt: str, *, on: On = "last", **arguments: Any) -> Image.Image:
        """Edit the last result or the original; the new picture.

        The session stays as it was if the call raises, or if it is interrupted (`pipe.interrupt`): then the picture
        from before comes back.

        Args:
            prompt: the instruction.
            on: "last" edits `picture`; "original" starts again from the original. Either can be undone.
            arguments: of the pipeline's call, such as `generator`, `negative_prompt` and `edit_mask`.

        Raises:
            TypeError, ValueError: an argument that the session gives itself, or as the pipeline's call.
        """
        installation = self._check(prompt, on, arguments)
        history, picture = self._history, self.picture if on == "last" else self.original
        sizes = size_for(self.pipe, picture)
        with installation.session.entered():
            output = self.pipe(image=picture, prompt=prompt, **{**sizes, **arguments})
        if getattr(self.pipe, "interrupt", False):
            return self.picture
        made = Edit(prompt, on, output.images[0], getattr(output, "report", None))
        self._history = _History((*history.edits[: history.done], made), history.done + 1)
        return made.picture

    def undo(self) -> Image.Image:
        """Take back the last edit; the picture before it.

        Raises:
            ValueError: there is no edit to take back.
        """
        if not self._history.done:
            raise ValueError("undo: expected at least one edit, got none to take back")
        self._history = _History(self._history.edits, self._history.done - 1)
        return self.picture

    def redo(self) -> Image.Image:
        """Make the edit again that `undo` has taken back, without running it; its picture. A new edit ends this.

        Raises:
            ValueError: nothing has been undone since the last edit.
        """
        if self._history.done == len(self._history.edits):
            raise ValueError("redo: expected an edit that was undone, got none since the last edit")
        self._history = _History(self._history.edits, self._history.done + 1)
        return self.picture

    def _check(self, prompt: Any, on: Any, arguments: dict[str, Any]) -> Installation:
        if not isinstance(prompt, str):
            raise TypeError(f"prompt: expected a string, got {type(prompt).__name__}")
        if on not in get_args(On):
            raise ValueError(f"on: expected 'last' or 'original', got {on!r}")
        for name in OWN:
            if name in arguments:
                raise TypeError(
                    f"{name}: expected no value, because a session makes one PIL picture of its own, got one"
                )
        installation = installation_of(self.pipe)
        if installation is None:
            raise ValueError(
                "edit: expected a pipeline with SpecEdit installed, but it was uninstalled; make a new session"
            )
        return installation


def settled(pipe: Any, picture: Image.Image) -> Image.Image:
    """The picture, at a size whose result the model takes as it is.

    Qwen's and LongCat's rules give some pictures an output that the next call would resize again, by less than 5 %.
    Such a picture is resized here, once.
    """
    size_for(pipe, picture)  # raises for what is no picture of such a pipeline
    adapter = adapter_of(pipe)
    assert adapter is not None
    sizes = [adapter.taken_size(pipe, picture)]
    for _ in range(SETTLING):
        height, width = sizes[-1]
        sizes.append(adapter.taken_size(pipe, Image.new("RGB", (width, height))))
        if sizes[-1] == sizes[-2]:
            break
    if sizes[-1] == sizes[0]:
        return picture
    height, width = sizes[-1]
    return picture.resize((width, height), Image.Resampling.LANCZOS)
