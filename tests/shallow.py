"""The embedded editors with few blocks, for tests of what is done with an editor and not of how well it edits."""

import copy
import dataclasses
import json
import re

import pytest

FEW = {"kontext": {"num_layers": 1, "num_single_layers": 1}, "qwen": {"num_layers": 1}}


def _keep_first_blocks(source, target, layers):
    """Write a transformer's folder with the blocks that `layers` leaves of it."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    config = json.loads((source / "config.json").read_text()) | layers
    (target / "config.json").write_text(json.dumps(config))
    for file in source.glob("*.safetensors"):
        held = load_file(file)
        blocks = {name: re.match(r"(single_)?transformer_blocks\.(\d+)\.", name) for name in held}
        limits = {None: layers["num_layers"], "single_": layers.get("num_single_layers")}
        kept = {name: held[name] for name, at in blocks.items() if at is None or int(at[2]) < limits[at[1]]}
        save_file(kept, target / file.name, {"format": "pt"})


@pytest.fixture(scope="session")
def shallow_weights(tmp_path_factory):
    """A folder like the package's own, in which the transformers have one block of each kind."""
    from specedit.micro.loading import WEIGHTS

    folder = tmp_path_factory.mktemp("shallow")
    for name, layers in FEW.items():
        (folder / name).mkdir()
        for part in (WEIGHTS / name).iterdir():
            if part.name == "transformer":
                _keep_first_blocks(part, folder / name / part.name, layers)
            else:
                (folder / name / part.name).symlink_to(part)
    return folder


@pytest.fixture(scope="session")
def pipelines_read():
    """The editors that were read, by folder. Nothing changes them."""
    return {}


@pytest.fixture
def editors_read_once(pipelines_read, monkeypatch):
    """`micro.load` copies what it has read before while the test runs."""
    from specedit import micro
    from specedit.micro.editors import editor_named

    def named(name):
        editor = editor_named(name)

        def load(folder):
            if folder not in pipelines_read:
                pipelines_read[folder] = editor.load(folder)
            return copy.deepcopy(pipelines_read[folder])

        return dataclasses.replace(editor, load=load)

    monkeypatch.setitem(micro.load.__globals__, "editor_named", named)


@pytest.fixture
def shallow_editors(shallow_weights, editors_read_once, monkeypatch):
    """The embedded editors are shallow while the test runs."""
    from specedit import micro

    monkeypatch.setitem(micro.load.__globals__, "WEIGHTS", shallow_weights)


@pytest.fixture
def few_renders(monkeypatch):
    """Textures are compared with two fresh renders of each kind, for tests of what is written of it."""
    from specedit.micro import judging

    monkeypatch.setattr(judging, "RENDERS", 2)
    monkeypatch.setattr(judging, "OTHERS", 2)
