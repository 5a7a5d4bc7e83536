"""`specedit app`: what is refused before a server starts."""

import sys
from contextlib import contextmanager

import pytest

from specedit import cli


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "80"], "--port: expected a whole number from 1,024 to 65,535, got 80"),
        (["--port", "x"], "argument --port: invalid int value: 'x'"),
        (["--max-mb", "0"], "--max-mb: expected a number from 0.001 to 1,000, got 0"),
        (["--max-megapixels", "nan"], "--max-megapixels: expected a number from 0.004 to 1,000, got nan"),
        (["--model", "no such"], "--model: expected kontext, qwen, a pipeline folder or a hub id (owner/name)"),
        (["--share"], "unrecognized arguments: --share"),
        (["--host", "0.0.0.0"], "unrecognized arguments: --host"),
    ],
)
def test_wrong_options_are_one_line(arguments, says, capsys):
    try:
        code = cli.main(["app", *arguments])
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2 and says in error and error.count("\n") == 1


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["app"]) == 2
    assert 'pip install "specedit[app]"' in capsys.readouterr().err


def test_options_reach_the_server_and_ctrl_c_ends_it(monkeypatch, capsys):
    import threading

    from specedit.app import server

    given = {}

    @contextmanager
    def serving(model, **more):
        given.update(more, model=model)
        yield "http://127.0.0.1:7999/"
        given["ended"] = True

    def wait(self, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "serving", serving)
    monkeypatch.setattr(threading.Event, "wait", wait)
    assert cli.main(["app", "--port", "7999", "--max-mb", "2", "--model", "qwen"]) == 0
    assert given["port"] == 7999 and given["limits"].bytes == 2_000_000 and given["model"] == "qwen" and given["ended"]
    assert "http://127.0.0.1:7999/" in capsys.readouterr().out
