"""Commands of a Python that has imported something before behave as Python's own."""

import contextlib
import os
import subprocess
import time

import pytest

from tests.warm_python import serving

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")


@pytest.fixture(scope="module")
def python():
    with serving(["decimal"]) as folder:
        yield str(folder / "python3")


def run(*command, **more):
    return subprocess.run(command, capture_output=True, text=True, **more)


def test_a_command_has_its_own_arguments_folder_and_environment(python, tmp_path):
    code = (
        "import sys, os; print('decimal' in sys.modules, 'csv' in sys.modules, sys.argv, os.getcwd(), os.environ['A'])"
    )
    done = run(python, "-c", code, "x", cwd=tmp_path, env=os.environ | {"A": "b"})
    assert done.stdout == f"True False ['-c', 'x'] {tmp_path} b\n" and done.returncode == 0 and done.stderr == ""
    (tmp_path / "beside.py").write_text("import sys; print(__name__, sys.argv[1:], sys.stdin.read())")
    for given, folder in ((("-m", "beside"), tmp_path), ((str(tmp_path / "beside.py"),), "/")):
        assert run(python, *given, "y", input="in", cwd=folder).stdout == "__main__ ['y'] in\n"
    assert run(python, "-c", "import beside", env=os.environ | {"PYTHONPATH": str(tmp_path)}, input="").returncode == 0
    assert run(python, "--version").stdout.startswith("Python 3")  # another form is passed on


def test_a_command_ends_as_it_would(python):
    assert run(python, "-c", "raise SystemExit(5)").returncode == 5
    failed = run(python, "-c", "1/0")
    assert failed.returncode == 1 and failed.stderr.endswith("ZeroDivisionError: division by zero\n")
    for signal in (9, 15):
        assert run(python, "-c", f"import os; os.kill(os.getpid(), {signal})").returncode == -signal


@contextlib.contextmanager
def sleeping(python):
    """A command that sleeps, and the process that runs it."""
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with subprocess.Popen(
        [python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as command:
        yield command, int(command.stdout.readline())


def is_gone(process):
    """Whether it is not there any more, within a minute."""
    ends = time.monotonic() + 60
    while os.path.exists(f"/proc/{process}") and time.monotonic() < ends:
        time.sleep(0.01)
    return not os.path.exists(f"/proc/{process}")


def test_a_command_that_is_killed_leaves_nothing_running(python):
    with sleeping(python) as (command, process):
        command.kill()
    assert is_gone(process)


def test_a_command_ends_with_the_python_that_runs_it():
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(serving(["decimal"]))
        with sleeping(str(folder / "python3")) as (command, process):
            stack.close()
        assert command.returncode == 1 and is_gone(process)
