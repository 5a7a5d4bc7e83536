"""What type checkers learn from the package: overrides, choices, and the types that functions return."""

import dataclasses
import importlib.resources
import importlib.util
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest

import specedit
from specedit import config
from specedit.config import CHOICES, SpecEditConfig
from specedit.overrides import Overrides

ROOT = Path(__file__).parents[1]


def test_overrides_are_the_fields_of_the_configuration():
    fields = typing.get_type_hints(SpecEditConfig)
    names = [field.name for field in dataclasses.fields(SpecEditConfig)]
    assert typing.get_type_hints(Overrides) == {name: fields[name] for name in names}
    assert not Overrides.__required_keys__


def test_choices_are_the_literals_of_the_fields():
    hints = typing.get_type_hints(SpecEditConfig)
    literals = {name: hint for name, hint in hints.items() if typing.get_origin(hint) is typing.Literal}
    assert {name: typing.get_args(hint) for name, hint in literals.items()} == CHOICES
    assert set(CHOICES["verify_at"]) == set(config.DEFAULT_THRESHOLDS)


@pytest.mark.parametrize("package", ["specedit", "specedit_kernels"])
def test_packages_are_marked_as_typed(package):
    assert importlib.resources.files(package).joinpath("py.typed").is_file()


def test_the_public_face_is_checked_strictly():
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert mypy["strict"] is True and mypy["files"] == ["specedit", "specedit_kernels"]
    skipped = {name for each in mypy["overrides"] if each.get("ignore_errors") for name in each["module"]}
    open_ = {"specedit", "specedit.api", "specedit.config", "specedit.cost", "specedit.method", "specedit_kernels"}
    assert not {f"{name}.*" for name in open_} & skipped and not open_ & skipped


USE = """
import specedit

class Pipe: ...

pipe = specedit.install(Pipe(), "turbo", restore="reference", threshold=0.3)
reveal_type(pipe)
reveal_type(specedit.uninstall(pipe))
with specedit.disabled(pipe) as stock:
    reveal_type(stock)
reveal_type(specedit.report(pipe).flops_ratio)
specedit.install(pipe, restore="refrence")
specedit.install(pipe, second_look=False)
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_mypy_passes_the_packages_and_follows_install(tmp_path):
    (tmp_path / "use.py").write_text(USE)
    settings = ROOT / "pyproject.toml"
    packages = tomllib.loads(settings.read_text())["tool"]["mypy"]["files"]
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), *packages, str(tmp_path / "use.py")]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout  # uses the repository's cache
    lines = [line for line in checked.splitlines() if "use.py" in line]
    assert [line.partition('is "')[2].rstrip('"') for line in lines if "note: Revealed" in line] == [
        "use.Pipe", "use.Pipe", "use.Pipe", "float",
    ]  # fmt: skip
    errors = [line for line in checked.splitlines() if "error:" in line]
    assert len(errors) == 2 and '"restore"' in errors[0] and '"second_look"' in errors[1], checked


def test_an_unknown_override_is_named_at_run_time():
    with pytest.raises(TypeError, match="second_look is now verify_coarse"):
        specedit.install(object(), second_look=False)
