"""`import specedit` is cheap, and every public name is there when it is asked for."""

import json
import pickle
import subprocess
import sys

import pytest

import specedit
from specedit import micro
from specedit.lazy import LazyPackage

HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL", "matplotlib")


def python(code: str) -> str:
    """What the code prints. It must not print anything to stderr."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_importing_the_package_and_the_vocabulary_imports_no_torch():
    heavy = f"[name for name in {HEAVY} if name in sys.modules]"
    assert python(f"import sys, specedit, specedit.cli, specedit.micro.vocabulary; print({heavy})") == "[]\n"


FRESH = """
import importlib, json, logging, pkgutil, sys
import specedit
found = {"submodules": [specedit.run_report.__name__, specedit.config.__name__]}
import specedit.api.installing, specedit.run_report, specedit.micro.loading
from specedit import config, install, report, micro
found["kinds"] = [type(x).__name__ for x in (install, report, specedit.install, micro.load, micro.evaluate, config)]
import specedit.cli
found["pytest"] = "pytest" in sys.modules
import specedit.testing
found["tests"] = [name for name in sys.modules if name.partition(".")[0] == "tests"]
import specedit_kernels
modules = [m.name for p in (specedit, specedit_kernels) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
for name in modules:
    if not name.endswith("__main__"):
        importlib.import_module(name)
found["loggers"] = [name for name in logging.root.manager.loggerDict if name.startswith("specedit")]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def fresh():
    """What a process of its own finds when it imports one part of the package after the other.

    Imports print nothing: the JSON is all there is, and `python` refuses other output.
    """
    return json.loads(python(FRESH))


@pytest.mark.thorough
def test_functions_take_precedence_over_modules_of_the_same_name(fresh):
    assert fresh["kinds"] == ["function"] * 5 + ["module"]


@pytest.mark.thorough
def test_nothing_but_the_shipped_tests_imports_pytest(fresh):
    assert fresh["pytest"] is False


@pytest.mark.thorough
def test_each_package_has_one_logger(fresh):
    assert sorted(fresh["loggers"]) == ["specedit", "specedit_kernels"]


@pytest.mark.thorough
def test_shipped_tests_need_no_test_of_the_repository(fresh):
    assert fresh["tests"] == []


@pytest.mark.parametrize("package", [specedit, micro])
def test_every_public_name_is_listed_and_found(package):
    assert isinstance(package, LazyPackage) and set(package.__all__) <= set(dir(package))
    names = {}
    exec(f"from {package.__name__} import *", names)
    for name in package.__all__:
        assert names[name] is getattr(package, name)


@pytest.mark.thorough
def test_submodules_are_found_without_importing_them_first(fresh):
    assert fresh["submodules"] == ["specedit.run_report", "specedit.config"]


@pytest.mark.parametrize("name", ["instal", "_private", "__wrapped__"])
def test_an_unknown_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'specedit' has no attribute '{name}'"):
        getattr(specedit, name)
    assert not hasattr(micro, name)


def test_public_names_pickle():
    for value in (specedit.install, specedit.report, micro.load):
        assert pickle.loads(pickle.dumps(value)) is value
    config = specedit.SpecEditConfig()
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_name_can_be_replaced_and_restored(monkeypatch):
    real = specedit.install
    with monkeypatch.context() as patch:
        patch.setattr(specedit, "install", print)
        assert specedit.install is print
    assert specedit.install is real
