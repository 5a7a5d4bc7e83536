"""specedit.Session: edit after edit, undo and redo, and what stays of the picture."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import specedit
from specedit.api.installation import installation_of
from specedit.api.session import settled
from specedit.method.haze import changed
from specedit.models.longcat import LongCatImageEdit
from tests.api.common import QUICK

CALL = dict(max_sequence_length=16, _auto_resize=False, height=128, width=128, max_area=128 * 128)
CORNER = np.zeros((128, 128), dtype=bool)
CORNER[:60, :60] = True


@pytest.fixture
def session(pipe, picture):
    return specedit.Session(pipe, picture(), **QUICK)


def edit(session, prompt="make it red", seed=0, **arguments):
    return session.edit(prompt, generator=torch.Generator().manual_seed(seed), **CALL | arguments)


def test_what_is_no_pipeline_is_refused_as_by_install(picture):
    with pytest.raises(TypeError, match=r"^install: expected one of FluxKontextPipeline.*got NoneType"):
        specedit.Session(None, picture())


@pytest.mark.slow
def test_edits_undo_and_redo(session):
    original = session.picture
    assert session.original is original and session.edits == () and session.report is None
    first = edit(session, edit_mask=CORNER)
    second = edit(session, "make it blue")
    assert session.picture is second and [step.prompt for step in session.edits] == ["make it red", "make it blue"]
    assert session.report is specedit.report(session.pipe) is session.edits[1].report
    assert session.report.config.keep_pixels and session.report.config.reuse_encodings
    assert session.undo() is first is session.picture and session.report is session.edits[0].report
    assert session.redo() is second and session.undo() is first and session.undo() is original
    assert session.redo() is first
    other = edit(session, "make it blue", on="original")
    assert [step.on for step in session.edits] == ["last", "original"] and session.picture is other
    with pytest.raises(ValueError, match=r"^redo: expected an edit that was undone, got none since the last edit"):
        session.redo()
    session.undo(), session.undo()
    with pytest.raises(ValueError, match=r"^undo: expected at least one edit, got none to take back"):
        session.undo()


@pytest.mark.slow
def test_a_session_is_the_same_edits_by_hand(session, make_pipe):
    """On the last result and on the original, bit for bit where every pixel of a cell changes."""
    first = edit(session, edit_mask=CORNER, seed=1)
    pipe = specedit.install(make_pipe(), **QUICK, keep_pixels=True)
    by_hand = pipe(
        image=session.original,
        prompt="make it red",
        edit_mask=CORNER,
        generator=torch.Generator().manual_seed(1),
        **CALL,
    ).images[0]
    a, b, source = (np.asarray(image) for image in (first, by_hand, session.original))
    assert ((a == b) | (a == source) | (abs(a.astype(int) - source) <= abs(b.astype(int) - source))).all()
    assert (a != source).any() and (a[64:] == source[64:]).all() and (a[:, 64:] == source[:, 64:]).all()


@pytest.mark.slow
def test_a_later_edit_encodes_only_what_is_new(session, count_calls):
    pipe = session.pipe
    edit(session, edit_mask=CORNER)
    prompts, pictures = count_calls(pipe.text_encoder_2), count_calls(pipe.vae.encoder)
    edit(session, edit_mask=CORNER)  # the same words on another picture
    assert (len(prompts), len(pictures)) == (0, 1) and session.report.reused == {"prompts": 1}
    edit(session, "make it blue", edit_mask=CORNER, on="original")
    assert (len(prompts), len(pictures)) == (1, 1) and session.report.reused == {"pictures": 1, "renditions": 1}
    session.undo()
    session.undo()
    edit(session, "make it blue", edit_mask=CORNER, seed=1)
    assert (len(prompts), len(pictures)) == (1, 1)


@pytest.mark.slow
def test_kept_pixels_are_the_originals_after_ten_edits(session):
    source = np.asarray(session.original)
    for seed in range(10):
        edit(session, seed=seed, edit_mask=CORNER)
    result = np.asarray(session.picture)
    assert len(session.edits) == 10 and (result[64:] == source[64:]).all() and (result[:, 64:] == source[:, 64:]).all()
    assert (result[:32, :32] != source[:32, :32]).any()


def test_what_the_autoencoder_alone_has_changed_is_no_edit(pipe, picture, monkeypatch):
    """The result is the picture's own rendition but for a patch: only that is taken from it, whatever the mask says."""
    session = specedit.Session(pipe, picture(), **QUICK)
    adapter, decodes = installation_of(pipe).adapter, []
    rendition = torch.from_numpy(np.array(picture(seed=5))).permute(2, 0, 1)[None] / 255

    def decode(pipe, state, tokens, output_type):
        decodes.append(output_type)
        if output_type == "pt":
            return rendition
        result = rendition[0].permute(1, 2, 0).mul(255).round().byte().numpy().copy()
        result[32:64, 32:64] = 255 - result[32:64, 32:64]
        return [Image.fromarray(result)]

    monkeypatch.setattr(type(adapter), "decode", staticmethod(decode))
    result, source = np.asarray(edit(session, edit_mask=np.ones((128, 128)))), np.asarray(session.original)
    assert decodes == ["pil", "pt"]
    outside = np.ones((128, 128), dtype=bool)
    outside[28:68, 28:68] = False
    assert (result[outside] == source[outside]).all() and (result[40:56, 40:56] != source[40:56, 40:56]).any()
    plain = pipe(image=session.original, prompt="make it red", edit_mask=np.ones((128, 128)), **CALL).images[0]
    assert (np.asarray(plain)[outside] != source[outside]).any()  # a call outside a session is as it was


def test_faint_differences_are_none():
    image = Image.new("RGB", (32, 32), (100, 100, 100))
    for offset, expected in ((6, 0), (9, 0.5), (12, 1)):
        weight = changed([image], torch.full((1, 3, 32, 32), (100 + offset) / 255))
        torch.testing.assert_close(weight, torch.full((1, 32, 32), float(expected)), atol=1e-4, rtol=0)


class Stop(BaseException):
    pass


@pytest.mark.slow
def test_what_fails_leaves_the_session_as_it_was(session):
    first = edit(session)
    edit(session)
    session.undo()
    for error in (ValueError, Stop):

        def fail(*_, error=error):
            raise error("no")

        handle = session.pipe.transformer.register_forward_hook(fail)
        with pytest.raises(error):
            edit(session, "make it blue")
        handle.remove()
    handle = session.pipe.transformer.register_forward_hook(lambda *_: setattr(session.pipe, "_interrupt", True))
    assert edit(session, "make it blue") is first
    handle.remove()
    assert session.picture is first and len(session.edits) == 1
    session.redo()
    assert len(session.edits) == 2 and not installation_of(session.pipe).session.inside


def test_an_installed_pipeline_keeps_its_configuration(pipe, picture):
    specedit.install(pipe, **QUICK)
    config = installation_of(pipe).config
    session = specedit.Session(pipe, picture())
    edit(session), edit(session, on="original")
    assert installation_of(pipe).config is config and session.report.reused["pictures"] == 1
    specedit.Session(pipe, picture(), "turbo")
    turbo = specedit.SpecEditConfig.preset("turbo")
    assert installation_of(pipe).config == dataclasses.replace(turbo, keep_pixels=True, reuse_encodings=True)
    own = specedit.SpecEditConfig(steps=(1, 1, 1))
    specedit.Session(pipe, picture(), own)
    assert installation_of(pipe).config == own


def test_wrong_uses(pipe, picture):
    for wrong, error, text in [
        (np.zeros((64, 64, 3)), TypeError, "^picture: expected a PIL image, got ndarray"),
        (picture().convert("L"), ValueError, "^picture: expected an RGB picture, got mode 'L'"),
    ]:
        with pytest.raises(error, match=text):
            specedit.Session(pipe, wrong)
    with pytest.raises(TypeError, match="expected one of FluxKontextPipeline"):
        specedit.Session(object(), picture())
    with pytest.raises(ValueError, match=r"^preset: expected one of"):
        specedit.Session(pipe, picture(), "none")
    assert installation_of(pipe) is None
    session = specedit.Session(pipe, picture(), **QUICK)
    for arguments, error, text in [
        (dict(prompt=["a", "b"]), TypeError, "^prompt: expected a string, got list"),
        (dict(prompt="a", on="first"), ValueError, "^on: expected 'last' or 'original', got 'first'"),
        (dict(prompt="a", image=picture()), TypeError, "^image: expected no value"),
        (dict(prompt="a", num_images_per_prompt=2), TypeError, "^num_images_per_prompt: expected no value"),
    ]:
        with pytest.raises(error, match=text):
            session.edit(**arguments)
    specedit.uninstall(pipe)
    with pytest.raises(ValueError, match=r"^edit: expected a pipeline with SpecEdit installed"):
        session.edit("a")
    assert session.edits == ()


def test_a_stock_call_is_an_edit_without_a_report(session):
    with pytest.warns(UserWarning, match="sigmas were given"):
        made = edit(session, sigmas=[1.0, 0.5])
    assert session.picture is made and session.report is None and len(session.edits) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "expected"), [((668, 2548), (512, 2016)), ((3951, 2721), (1216, 864)), ((512, 512), None)]
)
def test_a_picture_whose_output_would_be_resized_again_is_resized_once(qwen_parts, size, expected):
    from diffusers import QwenImageEditPipeline

    pipe = QwenImageEditPipeline(**qwen_parts)
    picture = Image.new("RGB", size[::-1])
    given = settled(pipe, picture)
    assert (given is picture) if expected is None else given.size == expected[::-1]
    sizes = specedit.size_for(pipe, given)
    again = Image.new("RGB", (sizes["width"], sizes["height"]))
    assert specedit.size_for(pipe, again) == sizes


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["small_qwen", "make_longcat"])
def test_families_whose_prompt_holds_the_picture(request, picture, fixture):
    """Every edit has the size of the one before; the original's encodings serve its next edit with the same words."""
    if fixture == "make_longcat" and LongCatImageEdit is None:
        pytest.skip("this diffusers has no LongCatImageEditPipeline")
    found = request.getfixturevalue(fixture)
    pipe, words = (found() if fixture.startswith("make_") else found), "make it red"
    session = specedit.Session(pipe, picture(96, 160), **QUICK)
    call = dict(edit_mask=CORNER, generator=torch.Generator().manual_seed(0))
    sizes = {session.edit(words, **call).size for _ in range(3)}
    assert len(sizes) == 1
    again = session.edit(words, on="original", **call)
    assert {again.size} == sizes
    assert {"prompts", "pictures", "renditions"} <= session.report.reused.keys()
