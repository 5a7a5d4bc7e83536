"""One person's work, without a page: edits, undo, going on, comparing, and being cancelled."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from specedit.api.installation import installation_of
from specedit.app.desk import MOST, Desk
from specedit.app.models import Models
from specedit.app.settings import Asked
from specedit.app.watch import Cancelled
from specedit.micro.loading import WEIGHTS

ASKED = Asked("make the circle red", "kontext", "turbo")


def silent(share, what):
    pass


@pytest.fixture
def mask():
    """The right half of the picture may change."""
    mask = Image.new("L", (128, 96))
    mask.paste(255, (96, 0, 128, 96))
    return mask


def differs(a, b):
    """Columns that differ."""
    return np.asarray(ImageChops.difference(a, b)).any((0, 2))


def test_an_edit_changes_what_was_painted_and_nothing_else(desk, mask):
    base = desk.base
    turn = desk.edit(ASKED, mask, silent)
    changed = differs(turn.edit.picture, base)
    assert changed[96:].any() and not changed[:64].any()
    assert turn is desk.turn and desk.turns == [turn] and desk.base is turn.before
    assert turn.edit.report.draft_steps == 0 and turn.seconds >= turn.edit.report.seconds


@pytest.mark.slow
def test_without_paint_the_draft_decides(desk):
    assert desk.edit(ASKED, None, silent).edit.report.draft_steps > 0


@pytest.mark.slow
def test_another_try_starts_from_the_same_picture(desk, mask):
    base = desk.base
    first, second = desk.edit(ASKED, mask, silent), desk.edit(replace(ASKED, seed=7), mask, silent)
    assert first.before is base and second.before is base and desk.turn is second
    assert desk.turns == [first, second] and [turn.number for turn in desk.turns] == [1, 2]
    desk.undo()
    assert desk.turn is None and desk.base is base and desk.turns == [first, second]


@pytest.mark.slow
def test_an_edit_on_the_result_undo_and_redo(desk, mask):
    base = desk.base
    first = desk.edit(ASKED, mask, silent)
    desk.go_on()
    assert desk.base is first.edit.picture
    second = desk.edit(ASKED, mask, silent)
    assert second.before is first.edit.picture
    desk.undo()
    assert desk.turn is first and desk.base is first.edit.picture
    desk.undo()
    assert desk.turn is None and desk.base is base
    desk.redo()
    desk.redo()
    assert desk.turn is second and desk.base is first.edit.picture
    third = desk.edit(ASKED, mask, silent)
    assert third.before is first.edit.picture and [turn.number for turn in desk.turns] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("masked", [True, False])
def test_a_cancelled_edit_stops_within_a_step(desk, mask, masked, loaded, hooked):
    """Cancelled in the third step: of the draft, where there is one, which no callback of the pipeline sees."""
    first = desk.edit(ASKED, mask, silent)
    forwards = []
    hooked(loaded["kontext"].transformer, lambda *_: forwards.append(1))

    def tell(share, what):
        if len(forwards) == 3:
            assert what.startswith("mixed" if masked else "draft") and desk.cancel()

    asked = Asked("make the square blue", "kontext", "turbo")
    with pytest.raises(Cancelled):
        desk.edit(asked, mask if masked else None, tell)
    assert len(forwards) <= 4
    assert desk.turn is first and desk.turns == [first]
    forwards.clear()
    assert desk.edit(asked, mask, silent).before is first.before


@pytest.mark.slow
def test_a_failed_edit_leaves_the_desk_as_it_was(desk, mask):
    first = desk.edit(ASKED, mask, silent)
    with pytest.raises(ValueError, match="edit_mask: expected some nonzero pixels, got an empty mask"):
        desk.edit(ASKED, Image.new("L", (128, 96)), silent)
    assert desk.turn is first and desk.turns == [first] and desk.base is first.before


def test_who_waits_hears_of_it_and_can_cancel(desk, models, mask):
    heard = []

    def tell(share, what):
        heard.append(what)
        desk.cancel()

    with models.turn(threading.Event(), silent), pytest.raises(Cancelled):
        desk.edit(ASKED, mask, tell)
    assert heard == ["waiting for another edit"] and desk.turns == []


@pytest.mark.slow
def test_one_desk_does_one_thing_at_a_time(desk, mask):
    refused = []

    def tell(share, what):
        for act in (desk.undo, desk.redo, desk.go_on, lambda: desk.open(desk.base)):
            with pytest.raises(ValueError, match="expected nothing under way, got an edit that is") as error:
                act()
            refused.append(str(error.value).partition(":")[0])

    desk.edit(ASKED, mask, tell)
    assert {"undo", "redo", "edit this result", "open"} == set(refused)


@pytest.mark.slow
def test_progress_names_every_stage(desk):
    heard = []
    desk.edit(ASKED, None, lambda share, what: heard.append((share, what)))
    shares = [share for share, _ in heard]
    assert shares == sorted(shares) and shares[-1] == 1
    names = [what.partition(",")[0] for _, what in heard]
    stages = [name for i, name in enumerate(names) if name not in names[:i]]
    assert stages == ["loading kontext", "encoding", "draft", "coarse", "mixed", "full", "decoding"]
    full = desk.turn.edit.report.config.steps[2]
    assert heard[-2][1] == f"full, step {full} of {full}"


@pytest.mark.slow
def test_two_desks_share_weights_and_nothing_else(models, picture, mask, loaded):
    desks = [Desk(models) for _ in range(2)]
    for i, desk in enumerate(desks):
        desk.open(picture(96, 128, i))
    turns = [desk.edit(ASKED, mask, silent) for desk in desks]
    assert differs(turns[0].edit.picture, turns[1].edit.picture).any()
    same = desks[1]
    same.open(picture(96, 128, 0))
    again = same.edit(ASKED, mask, silent)
    assert again.edit.report.reused.get("pictures", 0) == 0  # the first desk's encodings are not there
    assert not differs(again.edit.picture, turns[0].edit.picture).any()
    pipes = [desk._session.pipe for desk in desks]
    assert pipes[0] is not pipes[1] and pipes[0].transformer is pipes[1].transformer
    assert installation_of(loaded["kontext"]) is None
    for desk in desks:
        desk.close()
    assert installation_of(pipes[0]) is None and desks[0].base is None and desks[0].turns == []


@pytest.mark.slow
def test_stock_runs_the_same_call(desk, mask, loaded):
    turn = desk.edit(ASKED, mask, silent)
    heard = []
    assert desk.compare(lambda share, what: heard.append(what)) is turn
    assert "stock, step 28 of 28" in heard and turn.stock_seconds > 0
    given = dict(height=96, width=128, max_area=96 * 128, _auto_resize=False)
    stock = loaded["kontext"](
        image=turn.before, prompt=turn.edit.prompt, generator=torch.Generator().manual_seed(0), **given
    ).images[0]
    assert not differs(stock, turn.stock).any()


def test_a_large_picture_stays_large_until_an_edit_of_it_is_accepted(desk, mask, models, picture):
    """The model edits it smaller."""
    small = models.load("kontext", silent)
    models._loaded["kontext"] = replace(small, prepare=lambda image: small.prepare(image.resize((128, 96))))
    large = picture(192, 256)
    desk.open(large)
    turn = desk.edit(ASKED, mask, silent)
    assert turn.before.size == (128, 96) and desk.base is large
    desk.go_on()
    assert desk.base is turn.edit.picture
    desk.undo()
    assert desk.base is large


def test_a_folder_is_the_first_choice_and_its_own_kind(make_pipe, tmp_path):
    make_pipe().save_pretrained(tmp_path / "pipe")
    own = Models(str(tmp_path / "pipe"))
    assert own.names == (str(tmp_path / "pipe"), "kontext", "qwen")
    assert [own.is_embedded(name) for name in own.names] == [False, True, True]
    assert Asked(" paint a dragon ", own.names[0]).sentence(embedded=False) == ("paint a dragon", ())
    assert Models(str(WEIGHTS / "kontext")).is_embedded(str(WEIGHTS / "kontext"))
    assert Models("qwen").names == ("qwen", "kontext")
    with pytest.raises(ValueError, match="expected kontext, qwen, a pipeline folder or a hub id"):
        Models(str(tmp_path / "none"))


def test_another_model_starts_from_the_picture_shown(desk, mask):
    first = desk.edit(ASKED, mask, silent)
    desk.go_on()
    second = desk.edit(Asked("make the circle red", "qwen", "turbo"), mask, silent)
    assert second.before is first.edit.picture and desk.turns == [first, second]
    desk.undo()
    assert desk.turn is None and desk.base is first.edit.picture


def test_a_new_picture_forgets_the_old_one(desk, mask, picture):
    desk.edit(ASKED, mask, silent)
    desk.open(picture(64, 64))
    assert desk.turn is None and desk.turns == [] and desk.base.size == (64, 64)


def test_the_history_keeps_the_latest(desk, mask, monkeypatch):
    monkeypatch.setattr("specedit.app.desk.MOST", 2)
    for _ in range(3):
        desk.edit(ASKED, mask, silent)
    assert [turn.number for turn in desk.turns] == [2, 3] and MOST > 2


@pytest.mark.parametrize("act", ["undo", "redo", "go_on"])
def test_there_is_nothing_to_undo_at_first(desk, act):
    with pytest.raises(ValueError, match=r"expected .*edit.*, got none"):
        getattr(desk, act)()


def test_there_is_nothing_to_compare_at_first(desk):
    with pytest.raises(ValueError, match="compare: expected an edit to compare with, got none"):
        desk.compare(silent)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (Asked("  ", "kontext"), "prompt: expected what to change, got an empty text"),
        (Asked(None, "kontext"), "prompt: expected a text, got NoneType"),
        (Asked("x" * 3000, "kontext"), "prompt: expected at most 2000 characters, got 3,000"),
        (Asked("paint a dragon", "kontext"), 'prompt: expected words that the embedded editor knows, got "dragon"'),
        (Asked("remove the star", "other"), "model: expected one of kontext, qwen, got 'other'"),
        (Asked("remove the star", "kontext", "quick"), "got 'quick'"),
        (Asked("remove the star", "kontext", "turbo", "half"), "restore: expected one of"),
        (Asked("remove the star", "kontext", "turbo", "preset", -1), "seed: expected a whole number from 0"),
        (Asked("remove the star", "kontext", "turbo", "preset", 0.5), "seed: expected a whole number from 0"),
        (Asked("remove the star", "kontext", "turbo", "preset", None), "seed: expected a whole number, got nothing"),
        (Asked("remove the star", "kontext", "turbo", "preset", 0, "x", 400), "true_cfg_scale: expected a number"),
        (Asked("remove the star", "kontext", "ultra", "pixels"), "locked: expected 'coarse'"),
    ],
)
def test_wrong_settings_are_refused_before_a_model_is_loaded(desk, loaded, asked, says):
    with pytest.raises((ValueError, TypeError)) as error:
        desk.edit(asked, None, silent)
    assert says in str(error.value) and not loaded


def test_an_edit_without_a_picture_is_refused(models):
    with pytest.raises(ValueError, match="picture: expected one to edit, got none"):
        Desk(models).edit(ASKED, None, silent)
