"""Methods on the command line: by name, by a published setting, and from a file of the user's own."""

import json
import re
import sys
from pathlib import Path

import pytest

from specedit import cli
from specedit.cli.methods import PLUGIN
from specedit.registry import methods

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


@pytest.fixture
def plugin(tmp_path):
    """The file that docs/methods.md shows."""
    path = tmp_path / "fewer.py"
    path.write_text(
        next(code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "class" in code)
    )
    yield path
    methods.unregister("fewer")
    sys.modules.pop(PLUGIN, None)


@pytest.mark.slow
def test_a_users_own_method_stands_in_the_table(plugin, tmp_path, capsys):
    out = tmp_path / "rows.json"
    given = ["eval", "micro", "--cases", "1", "--size", "64", "--plugin", str(plugin), "--method", "fewer"]
    assert cli.main([*given, "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["mean"]["count"] == 1 and "--method fewer" in written["command"]
    capsys.readouterr()


def test_a_published_setting_runs(tmp_path):
    out = tmp_path / "rows.json"
    given = ["eval", "micro", "--cases", "1", "--size", "64", "--method", "steps", "--setting", "2"]
    assert cli.main([*given, "--json", str(out)]) == 0
    one, fifty = json.loads(out.read_text())["mean"]["flops_ratio"], 25
    assert one == pytest.approx(fifty, rel=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--method", "step"], "--method: expected 'specedit' or one of "),
        (["--method", "steps", "--setting", "9"], "setting: expected a published one of 'steps'"),
        (["--method", "steps", "--preset", "turbo"], "--preset: expected none with --method steps, got turbo"),
        (["--method", "steps", "--restore", "full"], "--restore: expected none with --method steps, got full"),
        (["--method", "ralu", "--steps", "2"], "num_inference_steps: expected at least 3 with method='ralu'"),
        (["--restore", "pixels", "--steps", "1"], "num_inference_steps: expected at least 2 with restore='pixels'"),
        (["--setting", "8"], "--setting: expected none without another --method, got 8"),
        (["--plugin", "none.py"], "--plugin: expected a Python file, got none.py"),
    ],
)
def test_what_is_refused_before_any_work(refused, given, message):
    assert message in refused("eval", "micro", *given)


def test_a_plugin_that_fails_says_why(refused, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    assert "broken.py cannot be imported, ZeroDivisionError: division by zero" in refused(
        "eval", "micro", "--plugin", broken
    )
    assert PLUGIN not in sys.modules


def test_what_cannot_be_judged_is_a_dash(tmp_path, capsys):
    given = ["eval", "micro", "--cases", "1", "--textures", "1", "--size", "64", "--method", "steps", "--setting", "1"]
    assert cli.main(given) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("texture"))
    assert "nan" not in row and row.split()[2:7] == ["-"] * 5
