"""Registries: what is found without being named anywhere, and what is wrong with a name."""

import builtins
import importlib.metadata
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint

import pytest

from specedit import registry
from specedit.registry import Registry


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Makes a package with files that register themselves, and gives its registry: `make(file=code, ...)`."""
    made = []

    def make(entries=(), **files):
        name = f"folder{len(made)}_{tmp_path.name}".replace("-", "_")
        package = tmp_path / name
        package.mkdir()
        shared = "from specedit.registry import Registry\n"
        (package / "__init__.py").write_text(f"{shared}things = Registry('thing', {name!r}, 'tests.things')\n")
        for file, code in files.items():
            (package / f"{file}.py").write_text(f"from {name} import things\n{code}\n")
        made.append(name)
        points = [EntryPoint(entry, value.format(name=name), "tests.things") for entry, value in entries]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == "tests.things" else [])
        return __import__(name).things

    monkeypatch.syspath_prepend(tmp_path)
    yield make
    for name in [module for module in sys.modules if module.partition(".")[0] in made]:
        del sys.modules[name]


def test_a_file_in_the_folder_is_found(folder):
    things = folder(cup="things.register('cup', 1)", plate="things.register('plate', 2)")
    assert things["cup"] == 1
    assert f"{things.package}.plate" not in sys.modules  # one name imports one file
    assert list(things) == ["cup", "plate"] and sorted(things.values()) == [1, 2]
    assert "cup" in things and "mug" not in things and 3 not in things and ["cup"] not in things


def test_a_name_may_differ_from_its_file(folder):
    things = folder(glass="things.register('tumbler', 3)")
    assert things["tumbler"] == 3


def test_an_unknown_name_lists_the_known_ones_and_suggests(folder):
    things = folder(cup="things.register('cup', 1)", plate="things.register('plate', 2)")
    with pytest.raises(
        ValueError, match=r"^thing: expected one of 'cup', 'plate', got 'plato'; did you mean 'plate'\?$"
    ):
        things["plato"]
    with pytest.raises(ValueError, match=r"^thing: expected one of 'cup', 'plate', got 3$"):
        things[3]
    for wrong in ("mug", 3, None, ["cup"]):
        with pytest.raises(ValueError, match="thing: expected one of"):
            things.check(wrong)


def test_a_check_imports_no_built_in(folder):
    things = folder(cup="raise RuntimeError('imported')")
    things.check("cup")
    with pytest.raises(RuntimeError, match="imported"):
        things["cup"]


def test_a_name_belongs_to_one_thing(folder):
    things = folder(cup="things.register('cup', 'the first')")
    first = things["cup"]
    assert things.register("cup", first) is first
    with pytest.raises(ValueError, match="thing: expected a new name, got 'cup', which 'the first' has"):
        things.register("cup", "another")
    assert things["cup"] is first
    things.unregister("cup")
    assert things.register("cup", "another") == things["cup"] == "another"


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_is_a_string(folder, name):
    with pytest.raises(TypeError, match=f"thing: expected a name, got {name!r}"):
        folder().register(name, object())


def test_entry_points_of_other_distributions(folder):
    things = folder(
        entries=[("spoon", "{name}.other.spoon:Spoon"), ("module", "{name}.other.fork")],
        cup="things.register('cup', 1)",
    )
    other = sys.modules[things.package].__path__[0]
    for file, code in {
        "__init__": "",
        "spoon": "class Spoon: name = 'spoon'",
        "fork": "things.register('fork', 4)",
    }.items():
        path = f"{other}/other"
        __import__("os").makedirs(path, exist_ok=True)
        with open(f"{path}/{file}.py", "w") as out:
            out.write(f"from {things.package} import things\n{code}\n")
    assert things["cup"] == 1 and f"{things.package}.other.fork" not in sys.modules
    assert things["fork"] == 4 and things["spoon"].__name__ == "Spoon"


def test_a_broken_entry_point_is_left_out_with_a_warning(folder):
    things = folder(entries=[("bad", "missing_package:Thing")], cup="things.register('cup', 1)")
    with pytest.warns(
        UserWarning, match=r"entry point 'bad' of tests.things \(missing_package:Thing\) is left out, Mod"
    ):
        assert list(things) == ["cup"]


def test_a_broken_file_is_an_error_every_time(folder):
    things = folder(cup="1 / 0")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            list(things)


def test_a_file_that_is_interrupted_registers_nothing(folder):
    code = "import builtins\nclass Cup: pass\nthings.register('cup', Cup)\n"
    code += "if hasattr(builtins, 'interrupt'): raise KeyboardInterrupt"
    things = folder(cup=code)
    builtins.interrupt = True
    try:
        with pytest.raises(KeyboardInterrupt):
            things["cup"]
    finally:
        del builtins.interrupt
    assert things["cup"].__module__ == f"{things.package}.cup"
    assert things["cup"] is sys.modules[f"{things.package}.cup"].Cup


def test_every_thread_sees_everything(folder):
    slow = "import time; time.sleep(0.05); things.register({!r}, 1)"
    things = folder(**{name: slow.format(name) for name in ("one", "two", "three")})
    start = threading.Barrier(8)

    def look(name):
        start.wait()
        return things[name], len(list(things))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(look, ["one", "two", "three", "three", "two", "one", "one", "two"]))
    assert found == [(1, 3)] * 8


def test_a_file_may_be_imported_while_another_thread_discovers(folder):
    """Registering waits for no discovery, or the two threads would wait for each other's import lock."""
    things = folder(
        early="import threading, time; time.sleep(0.1); things.register('early', 1)",
        late="import time; time.sleep(0.2); things.register('late', 2)",
    )
    thread = threading.Thread(target=__import__, args=(f"{things.package}.late",), daemon=True)
    thread.start()
    assert list(things) == ["early", "late"]
    thread.join(5)
    assert not thread.is_alive()


def test_a_module_may_look_up_names_while_being_imported(folder):
    things = folder(a="assert list(things) == []\nthings.register('a', 1)")
    assert list(things) == ["a"]


@pytest.mark.parametrize("names", [registry.selectors, registry.forecasts], ids=["selectors", "forecasts"])
def test_every_built_in_is_registered_by_the_module_of_its_name(names):
    for name in names:
        assert names[name].name == name and names[name].__module__ == f"{names.package}.{name}"


def test_a_selector_is_checked_without_importing_torch():
    code = "import sys, specedit.config as c; c.SpecEditConfig(selector='edges'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_registries_are_of_their_own():
    one, other = (Registry("thing", "tests.nowhere", "tests.nothing") for _ in range(2))
    one.register("cup", 1)
    assert "cup" in one._items and "cup" not in other._items
