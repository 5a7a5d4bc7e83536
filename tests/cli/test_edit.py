"""The options of `specedit edit` reach the call, and prompts reach the embedded editors in their own words."""

import numpy as np
import pytest
from PIL import Image

from specedit import cli, pipelines
from specedit.micro import vocabulary


@pytest.fixture
def edit(picture, tmp_path, capsys):
    def run(*given, prompt="make it greyscale"):
        code = cli.main(["edit", str(picture), prompt, "--out", str(tmp_path / "out.png"), *given])
        return code, capsys.readouterr()

    return run


def test_steps_and_threshold(edit, editor):
    assert edit("--steps", "7", "--threshold", "0.3", "--preset", "turbo", "--restore", "reference")[0] == 0
    assert editor.calls[0]["num_inference_steps"] == 7
    config = editor.configs[0]
    assert (config.threshold, config.restore, config.steps, config.keep_pixels) == (0.3, "reference", (2, 2, 5), False)
    assert edit("--keep-pixels")[0] == 0
    assert editor.calls[1]["num_inference_steps"] == 50 and editor.configs[1].keep_pixels


def test_size_is_the_longer_side(edit, editor, tmp_path, picture):
    Image.new("RGB", (300, 200), "red").save(picture)
    assert edit("--size", "160")[0] == 0
    call = editor.calls[0]
    assert call["image"].size == (160, 96) == (call["width"], call["height"]) and call["max_area"] == 160 * 96
    code, said = edit("--size", "160")
    assert said.out.splitlines()[-1] == f"wrote {tmp_path / 'out.png'}, 160 x 96 px of 300 x 200"


def test_size_is_rejected_for_pipelines_that_choose_it(edit, monkeypatch):
    class Chooses:
        def __call__(self, image, prompt):
            raise NotImplementedError

    monkeypatch.setattr(pipelines, "load", lambda *_, **__: (Chooses(), lambda image: (image, {})))
    code, said = edit("--size", "128")
    assert code == 2 and "--size: expected none with Chooses, which chooses its own, got 128" in said.err


@pytest.mark.slow
@pytest.mark.parametrize("model", pipelines.EDITORS)
def test_the_embedded_editors_take_every_option(edit, model, tmp_path, picture):
    Image.linear_gradient("L").resize((192, 128)).convert("RGB").save(picture)
    code, _ = edit(
        "--model", model, "--steps", "2", "--threshold", "0.5", "--size", "96", "--compare", str(tmp_path / "c.png")
    )
    assert code == 0 and Image.open(tmp_path / "out.png").size == (96, 64)
    assert Image.open(tmp_path / "c.png").size == (3 * 96 + 16, 64)


def test_transparency_is_restored(edit, editor, picture, tmp_path):
    image = Image.open(picture)
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 20, 64))
    image.putalpha(alpha)
    image.save(picture)
    code, said = edit()
    assert code == 0 and np.array_equal(Image.open(tmp_path / "out.png").getchannel("A"), alpha)
    assert "specedit: " in said.err and "transparent" in said.err


def test_synonyms_are_reported(edit, editor):
    code, said = edit(prompt="Make it gray!")
    assert code == 0 and editor.calls[0]["prompt"] == "make it greyscale"
    assert said.err == 'specedit: "gray" is read as "grey"\n' and 'asked to "make it greyscale"' in said.out


@pytest.mark.parametrize("model", [[], ["--model", "kontext"], ["--model", "qwen"]])
@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("frobnicate the circle", 'got "frobnicate"; its verbs are make, change'),
        ("make the dog red", 'got "dog"'),
        ("make the triangel red", 'got "triangel" (did you mean "triangle"?)'),
        ("make it red", "expected one of the embedded editor's sentences"),
    ],
)
def test_embedded_editor_rejects_unknown_prompts(refused, picture, tmp_path, prompt, says, model):
    assert says in refused("edit", picture, prompt, *model) and not (tmp_path / "edit.png").exists()


def test_other_pipelines_get_the_prompt_unchanged(edit, editor):
    assert edit("--model", "owner/name", prompt="Frobnicate the dog!")[0] == 0
    assert editor.calls[0]["prompt"] == "Frobnicate the dog!"


def test_help_lists_what_the_embedded_editors_understand(capsys):
    with pytest.raises(SystemExit):
        cli.main(["edit", "--help"])
    said = capsys.readouterr().out
    for word in (*vocabulary.COLOURS, *vocabulary.SHAPES, *vocabulary.PLACES):
        assert word in said
    assert all(phrase.split()[0] in said for group in vocabulary.PHRASES.values() for phrase in group)
