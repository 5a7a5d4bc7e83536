"""Errors are one line: exit code 2 for what the user can mend, 1 for what nobody expected."""

import argparse
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from specedit import cli, pipelines
from specedit.cli import errors
from specedit.config import resolve


@pytest.fixture
def failing(monkeypatch, capsys, picture):
    """Runs `specedit edit` with a pipeline whose loading raises; returns the exit code and stderr."""

    def run(error):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(pipelines, "load", fail)
        code = cli.main(["edit", str(picture), "remove the ring", "--out", str(picture.parent / "out.png")])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("error", [IndexError("list index out of range"), RuntimeError("a\nb"), AssertionError()])
def test_unexpected_error_names_its_type_and_the_traceback_switch(failing, error):
    first = (str(error) or type(error).__name__).splitlines()[0]
    hint = "SPECEDIT_TRACEBACK=1 in the environment shows where"
    assert failing(error) == (1, f"specedit: unexpected {type(error).__name__}: {first}; {hint}\n")


def explain(error, **args):
    return errors.explain(error, argparse.Namespace(**args))


def raised(make, file):
    """The error that code in `file` raises."""
    try:
        exec(compile("make()", file, "exec"), {"make": make})
    except Exception as error:
        return error


def test_rejected_value_exits_with_2():
    refused = raised(lambda: resolve("warp"), __file__)
    assert explain(refused) == (str(refused), 2) and "preset: expected one of" in str(refused)
    text, code = explain(raised(lambda: np.zeros(3).reshape(2), __file__))
    assert code == 1 and text.startswith("unexpected ValueError: cannot reshape array")


def test_files_are_named():
    assert explain(raised(lambda: Path("/no/such/file").read_text(), __file__)) == (
        "/no/such/file: No such file or directory",
        2,
    )


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory: x")],
)
def test_out_of_memory_names_the_options_that_help(error):
    text = "out of memory; {}a smaller picture or model takes less"
    assert explain(error, offload=False, size=None) == (text.format("--offload, --size, "), 2)
    assert explain(error, offload=True) == (text.format(""), 2)


def test_ctrl_c_is_quiet(failing):
    assert failing(KeyboardInterrupt()) == (130, "specedit: stopped\n")


def test_traceback_is_shown_on_request(failing, monkeypatch):
    monkeypatch.setenv("SPECEDIT_TRACEBACK", "1")
    with pytest.raises(IndexError):
        failing(IndexError("x"))
    monkeypatch.setenv("SPECEDIT_TRACEBACK", "0")
    assert failing(IndexError("x"))[0] == 1


def test_warnings_are_one_line(capsys):
    before = warnings.formatwarning
    with errors.one_line_warnings(), warnings.catch_warnings():
        warnings.simplefilter("always")
        assert warnings.formatwarning("the stock\npath ran", UserWarning, "f.py", 3) == "specedit: the stock path ran\n"
    assert warnings.formatwarning is before


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n" + bytes(99), b"GIF89a", b"text"])
def test_a_damaged_picture_is_one_line(refused, picture, content):
    good = picture.read_bytes()
    for broken in (content, good[: len(good) // 2]):
        picture.write_bytes(broken)
        assert "in.png: expected a picture" in refused("edit", picture, "remove the ring")


def test_a_damaged_mask_is_one_line(refused, picture, tmp_path):
    (tmp_path / "mask.png").write_bytes(picture.read_bytes()[:99])
    assert "mask.png: expected a picture" in refused("edit", picture, "remove the ring", "--mask", "mask.png")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--mask", "missing.png"], "--mask: expected a picture file, got missing.png, which does not exist"),
        (["--mask", "."], "--mask: expected a picture file, got ., which is a folder"),
        (["--true-cfg-scale", "nan"], "--true-cfg-scale: expected a number from 0 to 100, got nan"),
        (["--true-cfg-scale", "inf"], "--true-cfg-scale: expected a number from 0 to 100, got inf"),
        (["--true-cfg-scale", "-1"], "--true-cfg-scale: expected a number from 0 to 100, got -1"),
        (["--steps", "0"], "--steps: expected a whole number from 1 to 1,000, got 0"),
        (["--steps", "1001"], "--steps: expected a whole number from 1 to 1,000, got 1,001"),
        (["--threshold", "nan"], "--threshold: expected a number from 0 to 4"),
        (["--threshold", "4.5"], "--threshold: expected a number from 0 to 4"),
        (["--size", "32"], "--size: expected a whole number from 64 to 4,096, got 32"),
        (["--size", "100000"], "--size: expected a whole number from 64 to 4,096, got 100,000"),
    ],
)
def test_edit_rejects_bad_options(refused, picture, given, says):
    assert says in refused("edit", picture, "remove the ring", *given)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["bench", "--size", "1000000"], "--size: expected a multiple of 16 from 64 to 1024, got 1000000"),
        (["bench", "--repeat", "100000"], "--repeat: expected a whole number from 1 to 1,000, got 100,000"),
        (["eval", "micro", "--size", "4096"], "--size: expected a multiple of 16 from 64 to 1024"),
        (["eval", "micro", "--steps", "5000"], "--steps: expected a whole number from 1 to 1,000"),
        (
            ["eval", "gedit", "--data", ".", "--model", "kontext", "--true-cfg-scale", "nan"],
            "--true-cfg-scale: expected",
        ),
        (["bench", "plan", "--height", "0"], "--height: expected a whole number from 64 to 8,192, got 0"),
        (["bench", "plan", "--width", "1000000"], "--width: expected a whole number from 64 to 8,192"),
        (["bench", "plan", "--edited", "nan"], "--edited: expected percent, from 0 to 100, got nan"),
        (["bench", "plan", "--guidance-range", "nan", "1"], "guidance_range: expected two sigmas"),
        (["demo", "--size", "528"], "--size: expected a multiple of 16 from 128 to 512, got 528"),
        (["demo", "--out", "in.png"], "--out: expected a folder, got the file in.png"),
        (
            ["bench", "plan", "--measured", "in.png"],
            "--measured: expected a result file with machine and rows, got in.png",
        ),
    ],
)
def test_other_commands_reject_bad_options(refused, picture, given, says):
    assert says in refused(*given)


def test_bench_repeats_three_times_by_default():
    from specedit.cli import bench

    parser = argparse.ArgumentParser()
    bench.add(parser.add_subparsers())
    assert parser.parse_args(["bench"]).repeat == 3


def test_the_version(capsys):
    import specedit

    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"specedit {specedit.__version__}\n"


def test_help_is_quick_and_imports_no_torch():
    """Through `python -m specedit`; the best of three, as other processes may be busy."""
    code = "import runpy, sys\ntry:\n    runpy.run_module('specedit', run_name='__main__')\nfinally:\n    "
    code += "sys.stderr.write(' '.join(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules))))"
    seconds = []
    for given in (["--help"], ["edit", "--help"], ["--version"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
        seconds.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
        assert done.returncode == 0 and done.stderr == "" and "specedit" in done.stdout
    assert min(seconds) < 0.5


# A command that writes and imports no torch.
WRITES = """
from specedit import cli
cli.bench.add = lambda commands: commands.add_parser("bench").set_defaults(run=lambda args: print("line\\n" * 100_000))
raise SystemExit(cli.main(["bench"]))
"""


def test_broken_pipe_is_not_an_error():
    given = f"{sys.executable} -c '{WRITES}' | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", given], capture_output=True, text=True, env=os.environ)
    assert done.returncode in (0, 141) and done.stderr == ""
