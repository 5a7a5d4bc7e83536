"""Between page and desks: whose desk, what is shown, and errors as messages."""

import json
import socket
from types import SimpleNamespace

import gradio as gr
import pytest
from PIL import Image

from specedit.app import events as app_events
from specedit.app import examples, page, server
from specedit.app.people import People
from specedit.app.uploads import Limits
from specedit.app.watch import Cancelled

ASKED = ("make the circle red", "kontext", "turbo", "preset", 0, "", None)


def visit(name):
    """A request of the page with this secret."""
    return SimpleNamespace(session_hash=name)


@pytest.fixture
def people(models, tmp_path):
    return People(models, tmp_path / "results")


@pytest.fixture
def events(people):
    parts = page.Parts(**{name: name for name in page.Parts.__dataclass_fields__})
    return app_events.Events(parts, people, [], Limits())


@pytest.fixture
def upload(events, tmp_path, picture):
    """Uploads a picture on a page."""

    def send(visitor, seed=0):
        picture(96, 128, seed).save(tmp_path / f"{seed}.png")
        return events.opened(visitor, str(tmp_path / f"{seed}.png"))

    return send


def test_two_pages_do_not_see_each_others_pictures_or_reports(events, people, upload):
    first, second = visit("a"), visit("b")
    upload(first)
    edited = events.edit(first, lambda *_: None, None, *ASKED)
    assert "make the circle red" in edited["heading"] and len(edited["history"]) == 1
    shown = events.shown(second)
    assert shown["heading"] == "No edit yet." and shown["history"] == [] and shown["slider"] is None
    assert people.desk("b").base is None and people.folder("a") != people.folder("b")
    upload(second, 1)
    assert people.desk("a").turn is not None and people.desk("b").turns == []


def test_a_closed_page_takes_its_pictures_and_files_with_it(events, people, upload):
    upload(visit("a"))
    events.edit(visit("a"), lambda *_: None, None, *ASKED)
    desk, folder = people.desk("a"), people.folder("a")
    assert len(list(folder.rglob("*.png"))) == 1
    events.left(visit("a"))
    assert desk.base is None and not folder.exists() and people.desk("a") is not desk
    events.left(visit("never here"))
    upload(visit("b"))
    desk = people.desk("b")
    people.close()
    assert desk.base is None and people.desk("b") is not desk


def test_the_page_unused_for_longest_gives_way(people, monkeypatch):
    monkeypatch.setattr("specedit.app.people.MOST", 2)
    first, second = people.desk("a"), people.desk("b")
    assert people.desk("a") is first
    people.desk("c")
    assert people.desk("a") is first and people.desk("b") is not second


def test_a_call_without_a_page_is_refused(people):
    with pytest.raises(ValueError, match="page: expected a call from an open page"):
        people.desk(None)


def test_the_downloads_are_the_result_and_its_report(events, people, upload):
    upload(visit("a"))
    shown = events.edit(visit("a"), lambda *_: None, None, *ASKED)
    turn = people.desk("a").turn
    picture, report = turn.files
    assert Image.open(picture).tobytes() == turn.edit.picture.tobytes()
    content = json.loads(report.read_text())
    assert content["prompt"] == "make the circle red" and content["report"]["nfe"] == turn.edit.report.nfe
    assert shown["history"] == [(str(picture), "1. make the circle red")]
    assert "| TFLOPs |" in shown["cost"] and "not run" in shown["cost"] and "full" in shown["stages"]
    compared = events.compare(visit("a"), lambda *_: None)
    assert "not run" not in compared["cost"] and compared["stock"] == (turn.stock, turn.edit.picture)


def test_the_painter_gets_another_picture_only_where_the_next_edit_has_one(events, people, upload):
    began = upload(visit("a"))
    base = people.desk("a").base
    assert began["painter"] is base
    assert "painter" not in events.edit(visit("a"), lambda *_: None, None, *ASKED)
    assert events.move(visit("a"), "go_on")["painter"] is people.desk("a").turn.edit.picture
    assert events.move(visit("a"), "undo")["painter"].tobytes() == base.tobytes()
    assert "painter" not in events.move(visit("a"), "redo")
    assert events.cleared(visit("a"))["painter"] is people.desk("a").base


def test_a_broken_upload_leaves_the_picture_and_says_why(events, people, upload, tmp_path, monkeypatch):
    upload(visit("a"))
    base, said = people.desk("a").base, []
    monkeypatch.setattr(gr, "Warning", lambda text, **_: said.append(text))
    (tmp_path / "<b>.png").write_bytes(b"no picture")
    assert events.opened(visit("a"), str(tmp_path / "<b>.png")) == {"file": None}
    assert said[0].startswith("&lt;b&gt;.png: expected a picture that can be read")
    assert people.desk("a").base is base and events.opened(visit("a"), None) == {}


@pytest.mark.parametrize("index", [-1, 3, None, "x"])
def test_an_example_that_is_not_there_is_refused(events, index):
    with pytest.raises(ValueError, match="example: expected a number from 0 to"):
        events.took_example(visit("a"), index)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ZeroDivisionError("division\n by <zero>"), "unexpected ZeroDivisionError: division by &lt;zero&gt;"),
        (MemoryError(), "out of memory; a smaller picture or model takes less"),
        (OSError("no space"), "no space"),
        (RuntimeError(""), "unexpected RuntimeError: RuntimeError"),
    ],
)
def test_errors_are_one_line_without_a_trace(error, message, capsys):
    def handler():
        raise error

    with pytest.raises(gr.Error) as raised:
        app_events.guarded(handler)()
    assert raised.value.message == message and raised.value.__cause__ is None and raised.value.__context__ is None
    assert not raised.value.print_exception
    assert ("Traceback" in capsys.readouterr().err) == message.startswith("unexpected")


def test_our_own_refusals_are_shown_as_they_are(events):
    with pytest.raises(gr.Error) as raised:
        app_events.guarded(events.edit)(visit("a"), None, None, *ASKED)
    assert raised.value.message.startswith("picture: expected one to edit, got none")


def test_a_cancelled_edit_changes_nothing_on_the_page(monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Info", said.append)

    def handler():
        raise Cancelled

    assert app_events.guarded(handler)() == {} and said == ["Cancelled; nothing was changed."]


def test_the_page_offers_no_endpoint_and_loads_nothing_from_elsewhere(people, tmp_path):
    blocks = server.build(people, examples.write(tmp_path, 64), Limits())
    config = blocks.get_config_file()
    assert config["dependencies"] and {d["api_visibility"] for d in config["dependencies"]} == {"private"}
    assert config["analytics_enabled"] is False
    words = [c for c in config["components"] if c["type"] == "code" and "<color>" in str(c["props"].get("value"))]
    assert len(words) == 1
    look = page.theme()
    assert "url(http" not in look._get_theme_css() and not look._stylesheets


def test_the_server_listens_on_loopback_and_never_shares(monkeypatch):
    given = {}
    blocks = SimpleNamespace(queue=lambda **_: None, launch=lambda **more: given.update(more))
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_SHARE", "True")
    server.launch(blocks, 7999, Limits(bytes=5))
    assert given["server_name"] == "127.0.0.1" and given["share"] is False and given["max_file_size"] == 5
    assert given["run_history"] is False and given["show_error"] is False and given["server_port"] == 7999


def test_a_port_that_is_taken_is_refused_before_any_work():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port: expected a free one, got {port}: Address already in use"):
            with server.serving(port=port):
                pass
    server.check_port(port)
