"""A model that cannot be used is one line that says why and what to do, before anything of it is read."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from specedit import cli, micro, pipelines
from specedit.micro.loading import WEIGHTS
from specedit.pipelines import loading

PROMPT = "make the circle red"


@pytest.fixture
def folder(tmp_path):
    """The embedded editor's folder, with links in place of its files, so that a test can replace any of them."""
    for file in (WEIGHTS / "kontext").rglob("*.*"):
        link = tmp_path / "model" / file.relative_to(WEIGHTS / "kontext")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    return tmp_path / "model"


def put(file, content):
    file.unlink()
    file.write_bytes(content) if isinstance(content, bytes) else file.write_text(content)


def index(folder, **changes):
    written = json.loads((folder / "model_index.json").read_text()) | changes
    put(folder / "model_index.json", json.dumps(written))


def weights(folder, part):
    return next((folder / part).glob("*.safetensors"))


def pickled(folder):
    weights(folder, "transformer").unlink()
    torch.save({"a": torch.zeros(2)}, folder / "transformer" / "diffusion_pytorch_model.bin")


def truncate(folder):
    file = weights(folder, "vae")
    content = file.read_bytes()
    put(file, content[: len(content) // 2])


def remove(folder, part):
    for file in (folder / part).iterdir():
        file.unlink()
    (folder / part).rmdir()


def missing_shard(folder):
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(shards))


FAULTS = {
    "{}": (lambda f: put(f / "model_index.json", "{}"), 'expected the pipeline\'s class as "_class_name"'),
    "list": (lambda f: put(f / "model_index.json", "[1]"), 'expected the pipeline\'s class as "_class_name"'),
    "no json": (lambda f: put(f / "model_index.json", "nonsense"), "model_index.json: Expecting value"),
    "no text": (lambda f: put(f / "model_index.json", b"\xff\xfe\x00"), "expected JSON in"),
    "class": (lambda f: index(f, _class_name="NoPipeline"), "got 'NoPipeline', which diffusers"),
    "no class": (lambda f: index(f, _class_name="__version__"), "got '__version__', which diffusers"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "expected a pipeline directory with a model_index.json"),
    "garbage": (lambda f: put(weights(f, "transformer"), b"garbage" * 99), "expected whole weights in"),
    "empty weights": (lambda f: put(weights(f, "transformer"), b""), "expected whole weights in"),
    "truncated": (truncate, "vae/diffusion_pytorch_model.safetensors: "),
    "pickled": (pickled, "got diffusion_pytorch_model.bin, a pickle, which could run code"),
    "missing part": (lambda f: remove(f, "vae"), "expected the part vae in"),
    "empty tokenizer folder": (
        lambda f: [t.unlink() for t in (f / "tokenizer").iterdir()],
        "expected the part tokenizer",
    ),
    "missing shard": (missing_shard, "expected the weights model-00001-of-00002.safetensors in"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_folder_is_rejected_before_loading(folder, picture, fault, capsys, monkeypatch):
    monkeypatch.setattr(loading, "from_pretrained", lambda *_: pytest.fail("the pipeline was read"))
    spoil, says = FAULTS[fault]
    spoil(folder)
    assert cli.main(["edit", str(picture), PROMPT, "--model", str(folder)]) == 2
    error = capsys.readouterr().err
    assert says in error and "--model: expected" in error and error.count("\n") == 1


def wrong_tensors(folder):
    file = weights(folder, "transformer")
    file.unlink()
    save_file({"a": torch.zeros(2)}, str(file), metadata={"format": "pt"})


READ_FAULTS = {
    "part's class": (lambda f: index(f, transformer=["diffusers", "NoModel"]), "NoModel"),
    "missing entry": (lambda f: index(f, vae=[None, None]), "vae"),
    "no config": (lambda f: (f / "transformer" / "config.json").unlink(), "config.json"),
    "broken config": (lambda f: put(f / "vae" / "config.json", "{"), "config.json"),
    "empty tokenizer": (lambda f: put(f / "tokenizer" / "tokenizer.json", "{}"), "added_tokens"),
    "no tokenizer": (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), "that can be read"),
    "other weights": (wrong_tensors, "expected the weights of FluxTransformer2DModel in"),
}


@pytest.mark.parametrize("fault", READ_FAULTS)
def test_error_while_reading_weights_is_one_line(folder, fault, capsys, picture):
    spoil, says = READ_FAULTS[fault]
    spoil(folder)
    assert cli.main(["edit", str(picture), PROMPT, "--model", str(folder), "--out", str(folder / "out.png")]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "specedit: " in line]
    assert len(error) == 1 and says in error[0] and "download or save the pipeline again" in error[0]


def test_empty_tokenizer_is_rejected():
    class Empty:
        all_special_ids = (0,)

        def __call__(self, text):
            return type("Encoding", (), {"input_ids": [0]})

    pipe = type("Pipe", (), {"components": {"tokenizer_2": Empty()}})()
    with pytest.raises(
        ValueError, match="--model: expected a tokenizer_2 that knows words, got an empty one in some/one"
    ):
        loading._check_parts(pipe, None, "some/one")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("./missing", "got './missing', which does not exist"),
        ("/no/where", "got '/no/where', which does not exist"),
        ("~/no-such-folder", "got '~/no-such-folder', which does not exist"),
        ("a/b/c", "got 'a/b/c', which does not exist"),
        ("kontxt", "expected kontext, qwen, a pipeline folder or a hub id (owner/name), got 'kontxt'"),
        ("", "got ''"),
        ("in.png", "got the file in.png; save the pipeline with save_pretrained"),
    ],
)
@pytest.mark.parametrize("command", ["edit", "eval"])
def test_unknown_model_name_is_rejected(refused, picture, model, says, command):
    given = ["edit", picture, PROMPT] if command == "edit" else ["eval", "gedit", "--data", "."]
    assert says in refused(*given, "--model", model)


def test_the_hub_cannot_be_reached(picture, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["edit", str(picture), PROMPT, "--model", "no-such-owner/no-such-editor"]) == 2
    error = capsys.readouterr().err
    assert "it is not in the local cache, and the hub cannot be reached" in error and error.count("\n") == 1
    assert "hf download no-such-owner/no-such-editor" in error


class GatedRepoError(OSError):
    pass


class RepositoryNotFoundError(OSError):
    pass


class EntryNotFoundError(OSError):
    pass


@pytest.mark.parametrize(
    ("cause", "says"),
    [
        (GatedRepoError("401"), "its licence has to be accepted first; do so at https://huggingface.co/owner/name"),
        (RepositoryNotFoundError("404"), "the hub has no such pipeline, or not for you"),
        (EntryNotFoundError("404"), "the hub has it without model_index.json or without .safetensors"),
        (ConnectionError("no route"), "the hub cannot be reached"),
        (KeyError("odd"), "odd"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch, cause, says):
    def fail(*_, **given):
        assert given["use_safetensors"]
        raise OSError("Cannot load model\nsee the stack trace above") from cause

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", fail)
    if isinstance(cause, KeyError):
        says = "Cannot load model see the stack trace above"
    with pytest.raises(ValueError, match=r"^--model: expected a pipeline that can be read, got owner/name: ") as error:
        loading.from_pretrained("owner/name", torch.float32)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_complete_folder_is_accepted(folder):
    loading.check_model(str(folder))
    assert type(loading.from_pretrained(str(folder), torch.float32)).__name__ == "FluxKontextPipeline"


def test_a_pipeline_of_another_kind_is_refused_before_its_weights_are_read(folder, picture, capsys, monkeypatch):
    monkeypatch.setattr(loading, "from_pretrained", lambda *_: pytest.fail("the pipeline was read"))
    index(folder, _class_name="FluxPipeline")
    assert cli.main(["edit", str(picture), PROMPT, "--model", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "expected one of FluxKontextPipeline, " in error and "which is a FluxPipeline" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("editor", ["kontext", "qwen"])
def test_a_folder_of_an_embedded_editor_is_that_editor(editor, picture, tmp_path, capsys, monkeypatch):
    """It is asked in its own words, and edits pictures at their own size."""
    given = ["edit", str(picture), "--model", str(WEIGHTS / editor), "--out", str(tmp_path / "out.png")]
    assert cli.main([given[0], given[1], "frobnicate the circle", *given[2:]]) == 2
    assert '"frobnicate"' in capsys.readouterr().err
    assert cli.main([*given[:2], "make the circle gray", *given[2:], "--preset", "turbo"]) == 2
    pipe, prepare = pipelines.load(str(WEIGHTS / editor))
    _, arguments = prepare(Image.new("RGB", (96, 64)))
    assert type(pipe) is type(micro.load(editor)) and arguments == micro.arguments(Image.new("RGB", (96, 64)), editor)


def test_what_is_like_an_embedded_editor_is_read_from_its_folder(folder, tmp_path):
    assert loading.embedded_editor(str(folder)) == "kontext"
    index(folder, _class_name="OwnSizeQwenImageEditPipeline")
    assert loading.embedded_editor(str(folder)) == "qwen"
    index(folder, _class_name=["module", "Class"])
    assert loading.embedded_editor(str(folder)) is None
    (folder / "transformer" / "config.json").unlink()
    assert loading.embedded_editor(str(folder)) is loading.embedded_editor("owner/name") is None
