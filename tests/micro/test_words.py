"""Which prompts the embedded editors understand."""

import warnings

import pytest

from specedit import micro
from specedit.micro import scenes, words
from specedit.micro.vocabulary import COLOURS, KINDS, SHAPES


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_prompt_is_understood(kind):
    for seed in range(100):
        prompt = scenes.describe(seed, kind).prompt
        assert micro.understood(prompt) == (prompt, ())


@pytest.mark.parametrize(
    ("prompt", "own", "notes"),
    [
        ("Make it gray.", "make it greyscale", ['"gray" is read as "grey"']),
        ("convert it to grayscale", "convert the image to greyscale", ['"grayscale" is read as "greyscale"']),
        ("turn the photo black-and-white", "turn the picture black and white", ['"photo" is read as "picture"']),
        ("please remove red circle", "remove the red circle", []),
        ("remove the star from the image", "remove the star", []),
        ("get rid of the ring", "remove the ring", ['"get rid of" is read as "remove"']),
        ("recolour the violet star to red", "recolor the purple star to red",
         ['"recolour" is read as "recolor"', '"violet" is read as "purple"']),
        ("color the circle red", "make the circle red", []),
        ("put an orange ring in the middle", "put a orange ring in the center", ['"middle" is read as "center"']),
        ("Add a big red star to the upper left", "add a large red star at the top left",
         ['"upper left" is read as "top left"', '"big" is read as "large"']),
        ("replace the red square by a ring", "turn the red square into a ring", []),
        ("turn the background into a gradient from red to blue", "make the background a gradient from red to blue", []),
    ],
)  # fmt: skip
def test_synonymous_prompts_are_rewritten(prompt, own, notes):
    assert micro.understood(prompt) == (own, tuple(notes))
    assert micro.understood(own) == (own, ())


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("frobnicate the circle", 'got "frobnicate"; its verbs are make, change, paint'),
        ("make the dog red", 'got "dog"; '),
        ("make the bleu sqare red", 'got "bleu" (did you mean "blue"?), "sqare" (did you mean "square"?)'),
        ("make the circle grey", '"grey" is none of its colors'),
        ("make the red", "sentences, such as"),
        ("circle red", "sentences, such as"),
        ("add a red star", '"add a small red star at the top left"'),
        ("remove the red circle and the blue star", "sentences, such as"),
        ("", "sentences, such as"),
        ("mache den Kreis rot", 'got "mache"'),
        ("猫", 'got "猫"'),
    ],
)
def test_unknown_words_are_named(prompt, says):
    with pytest.raises(ValueError, match=r"^prompt: expected ") as error:
        micro.understood(prompt)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_synonyms_are_words_that_the_editors_lack():
    for word, known in words.SYNONYMS.items():
        assert not set(word.split()) <= words.known_words() - {"top", "bottom"} or word == "an"
        assert set(known.split()) <= words.known_words()
    assert {*COLOURS, *SHAPES} <= words.known_words()


def test_unknown_prompt_warns_in_python():
    with pytest.warns(UserWarning, match=r'the embedded editor does not understand this: .*got "frobnicate"'):
        words.warn_unless_understood(["remove the ring", "frobnicate the ring"], set())
    with pytest.warns(UserWarning, match=r'was trained on "make it greyscale", got .Make it gray.; specedit'):
        words.warn_unless_understood("Make it gray", set())


@pytest.mark.parametrize("text", ["remove the ring", "", " ", "blue", ["blue star", "make it greyscale"]])
def test_understood_prompts_do_not_warn(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words.warn_unless_understood(text, set())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kontext", "qwen"])
def test_the_editors_warn_once_of_each_prompt_and_pipeline(name):
    def warned(pipe, prompt):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            pipe.encode_prompt(prompt=prompt, **({} if name == "qwen" else {"prompt_2": None}))
        return [str(one.message) for one in caught if issubclass(one.category, UserWarning)]

    pipe = micro.load(name)
    (first,) = warned(pipe, "frobnicate the ring")
    assert 'got "frobnicate"' in first
    assert warned(pipe, "frobnicate the ring") == [] == warned(pipe, "remove the ring")
    assert len(warned(micro.load(name), "frobnicate the ring")) == 1
