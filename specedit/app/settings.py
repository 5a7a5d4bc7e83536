"""What a person asks of an edit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..batch import settings
from ..micro import words

LONGEST = 2000  # characters of a prompt
PRESET = "preset"  # stands for the preset's own value of `restore`


@dataclass(frozen=True)
class Asked:
    """One edit's settings, as the page gives them: not yet checked.

    preset: its name. restore: "preset", or a value of that field. seed: a whole number, perhaps as a float.
    negative_prompt, true_cfg_scale: empty or None where they are not given.
    """

    prompt: Any
    model: Any
    preset: Any = None
    restore: Any = PRESET
    seed: Any = 0
    negative_prompt: Any = ""
    true_cfg_scale: Any = None

    def checked(self) -> settings.Settings:
        """Configuration, seed and guidance. In a session unedited pixels are kept and encodings reused.

        Raises:
            TypeError, ValueError: naming the setting, what was expected and what came.
        """
        check_prompt(self.prompt)
        given = {"preset": self.preset, "seed": self.seed, "true_cfg_scale": self.true_cfg_scale}
        given |= {"restore": None if self.restore == PRESET else self.restore}
        given |= {"negative_prompt": self.negative_prompt or None}
        if self.seed is None:
            raise ValueError("seed: expected a whole number, got nothing")
        given = {name: value for name, value in given.items() if value is not None}
        return settings.check({**given, "keep_pixels": True, "reuse_encodings": True})

    def sentence(self, embedded: bool) -> tuple[str, tuple[str, ...]]:
        """The prompt for the model, and notes: an embedded editor is asked in its own words. Raises ValueError."""
        if not embedded:
            return self.prompt.strip(), ()
        prompt, notes = words.understood(self.prompt)
        asked = () if prompt == self.prompt.strip() else (f'the editor is asked to "{prompt}"',)
        return prompt, (*notes, *asked)


def check_prompt(prompt: Any) -> None:
    """Raises TypeError, ValueError."""
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: expected a text, got {type(prompt).__name__}")
    if not prompt.strip():
        raise ValueError("prompt: expected what to change, got an empty text")
    if len(prompt) > LONGEST:
        raise ValueError(f"prompt: expected at most {LONGEST} characters, got {len(prompt):,}")
