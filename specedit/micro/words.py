"""Prompts that the embedded editors understand: synonyms, rewrites, and errors for unknown words."""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections.abc import Iterable

from ..once import warn_caller
from .vocabulary import BACKGROUNDS, COLOURS, MATERIALS, PHRASES, PLACES, SHAPES, SIZES

# Synonyms of the editors' words. Longer expressions come first.
SYNONYMS: dict[str, str] = {
    "get rid of": "remove", "upper left": "top left", "upper right": "top right", "lower left": "bottom left",
    "lower right": "bottom right", "gray": "grey", "grayscale": "greyscale",
    "monochrome": "greyscale", "colour": "color", "recolour": "recolor", "centre": "center", "middle": "center",
    "violet": "purple", "big": "large", "little": "small", "tiny": "small", "disc": "circle", "disk": "circle",
    "rhombus": "diamond", "photo": "picture", "photograph": "picture", "checkered": "checkerboard",
    "chequerboard": "checkerboard", "an": "a",
}  # fmt: skip
FILLERS = ("please", "kindly", "now")

# Sentences that mean the same as one of PHRASES.
_REWRITES: tuple[tuple[str, str], ...] = (
    (r"(?:make|turn) (?:it|the picture|the image|everything) (?:into )?(?:grey|greyscale|black and white)",
     "make it greyscale"),
    (r"convert (?:it|the picture|the image) to (?:grey|greyscale|black and white)", "convert the image to greyscale"),
    (r"(remove|delete|take away|erase) (?:the )?({object})(?: from the (?:picture|image))?", r"\1 the \2"),
    (r"(?:make|turn|paint|recolor|color) (?:the )?({object}) (?:(?:to|into) )?({colour})", r"make the \1 \2"),
    (r"change (?:the )?({object}) to ({colour})", r"make the \1 \2"),
    (r"(add|put|place|draw) (?:a )?({new}) (?:at|in|on|to) (?:the )?({place})(?: of the (?:image|picture))?",
     r"\1 a \2 at the \3"),
    (r"(?:turn|change|make|replace) (?:the )?({object}) (?:(?:into|to|with|by) )?(?:a )?({shape})",
     r"turn the \1 into a \2"),
    (r"(?:change|replace|turn|make) (?:the )?background (?:(?:to|with|into|by) )?({background})",
     r"make the background \1"),
    (r"(?:fill|cover|paint|make|turn|change|replace|draw) (?:the )?({region}) (?:(?:with|in|into|to|by) )?({material})",
     r"fill the \1 with \2"),
)  # fmt: skip


def understood(prompt: str) -> tuple[str, tuple[str, ...]]:
    """Rewrite a prompt in the embedded editors' own words.

    Args:
        prompt: one instruction in English, such as "make the red circle blue".

    Returns:
        The sentence for the editor, and a note for each replaced word.

    Raises:
        ValueError: unknown words, which it names, or no known sentence.
    """
    words = re.sub(r"[\s_]+", " ", re.sub(r"[.!,;:\"“”]", " ", prompt.lower().replace("-", " "))).strip()
    notes = []
    for word, known in SYNONYMS.items():
        words, count = re.subn(rf"\b{word}\b(?!')", known, words)
        if count and word != "an":
            notes.append(f'"{word}" is read as "{known}"')
    words = " ".join(word for word in words.split() if word not in FILLERS)
    if unknown := [word for word in dict.fromkeys(words.split()) if word not in known_words()]:
        raise ValueError(
            f"prompt: expected words that the embedded editor knows, got {_named(unknown)}; its verbs are "
            f"{', '.join(_verbs())}, its colors {', '.join(COLOURS)}, its shapes {', '.join(SHAPES)}"
        )
    if any(re.fullmatch(pattern, words) for pattern in _patterns()):
        return words, tuple(notes)
    for pattern, sentence in _REWRITES:
        if found := re.fullmatch(_fill(pattern), words):
            return found.expand(sentence), tuple(notes)
    grey = '; "grey" is none of its colors' if "grey" in words.split() else ""
    raise ValueError(
        f"prompt: expected one of the embedded editor's sentences, such as {_closest(words)}, got {prompt.strip()!r}"
        f"{grey}"
    )


def warn_unless_understood(texts: str | Iterable[str], warned: set[str]) -> None:
    """Warn of each prompt that an editor was not trained on. Single words, as in negative prompts, are fine.

    warned: the prompts that this pipeline has warned of, which grows.
    """
    for text in [texts] if isinstance(texts, str) else texts:
        if text not in warned and (problem := _problem(text)) is not None:
            warned.add(text)
            warn_caller(problem)


@functools.lru_cache(maxsize=4096)
def _problem(text: str) -> str | None:
    words = text.split()
    if any(re.fullmatch(pattern, text) for pattern in _patterns()):
        return None
    if known_words().issuperset(words) and (not words or words[0] not in _verbs()):
        return None
    try:
        own, _ = understood(text)
    except ValueError as error:
        return f"the embedded editor does not understand this: {error}"
    return f'the embedded editor was trained on "{own}", got {text!r}; specedit.micro.understood finds its words'


def help_text() -> str:
    """Every sentence that the editors understand, and the words that fill it, for help texts."""
    names = {name: f"<{name.replace('colour', 'color')}>" for name in _fields()}
    lines = [phrase.format(**names) for group in PHRASES.values() for phrase in group]
    return "\n".join(
        [
            *(f"  {line}" for line in lines),
            "where",
            f"  <object> is <color> <shape> or <shape>, <new> is [{'|'.join(filter(None, SIZES))}] <color> <shape>,",
            f"  <color>: {', '.join(COLOURS)}",
            f"  <shape>: {', '.join(SHAPES)}",
            f"  <place>: {', '.join(PLACES)}",
            "  <region>: background, <object>",
            f"  <material>: {', '.join(MATERIALS)}",
            f"  <background>: {', '.join(b.format(c1='<color>', c2='<color>') for b in BACKGROUNDS.values())}",
        ]
    )


@functools.cache
def known_words() -> frozenset[str]:
    """Every word that a prompt can contain."""
    sentences = [*itertools.chain(*PHRASES.values()), *BACKGROUNDS.values(), *(pattern for pattern, _ in _REWRITES)]
    texts = [
        *(re.sub(r"\{\w+\}|\\\d|[^\w\s]", " ", s) for s in sentences),
        *COLOURS,
        *SHAPES,
        *PLACES,
        *SIZES,
        *MATERIALS,
    ]
    return frozenset(word for text in texts for word in text.split())


def _verbs() -> tuple[str, ...]:
    return tuple(dict.fromkeys(phrase.split()[0] for phrase in itertools.chain(*PHRASES.values())))


def _fields() -> dict[str, str]:
    """A regular expression for every field of a phrase."""
    colour, shape, place = (_any(names) for names in (COLOURS, SHAPES, PLACES))
    return dict(
        colour=colour,
        shape=shape,
        place=place,
        object=f"(?:{colour} )?{shape}",
        region=f"(?:background|(?:{colour} )?{shape})",
        material=_any(MATERIALS),
        new=f"(?:{_any(filter(None, SIZES))} )?{colour} {shape}",
        background=_any(b.format(c1=colour, c2=colour) for b in BACKGROUNDS.values()),
    )


def _any(words: Iterable[str]) -> str:
    return f"(?:{'|'.join(sorted(words, key=len, reverse=True))})"


def _fill(pattern: str) -> str:
    for name, expression in _fields().items():
        pattern = pattern.replace(f"{{{name}}}", expression)
    return pattern


@functools.cache
def _patterns() -> tuple[str, ...]:
    return tuple(_fill(phrase) for group in PHRASES.values() for phrase in group)


def _named(unknown: list[str]) -> str:
    """The words, each with the most similar known one."""
    named = []
    for word in unknown:
        close = difflib.get_close_matches(word, sorted(known_words()), n=1, cutoff=0.75)
        named.append(f'"{word}"' + (f' (did you mean "{close[0]}"?)' if close else ""))
    return ", ".join(named)


def _closest(words: str) -> str:
    examples = dict(
        object="red circle", colour="blue", shape="star", new="small red star", place="top left",
        background="blue and white stripes", region="background", material="clouds",
    )  # fmt: skip
    sentences = [phrase.format(**examples) for group in PHRASES.values() for phrase in group]
    return " or ".join(f'"{s}"' for s in difflib.get_close_matches(words, sentences, n=2, cutoff=0))
