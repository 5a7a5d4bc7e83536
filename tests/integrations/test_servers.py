"""Plugins of servers: settings of the server and of requests, steps, bad input, and what the log says."""

import logging
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import specedit
from specedit.api.installation import installation_of
from specedit.api.installing import is_active
from specedit.integrations import serving

STEPS = '{"steps": [1, 1, 1], "draft_steps": 1}'


@pytest.fixture(autouse=True)
def quick(monkeypatch, caplog):
    monkeypatch.setenv("SPECEDIT_SERVER_SETTINGS", STEPS)
    monkeypatch.setattr(serving.logger, "level", logging.INFO)
    caplog.set_level(logging.INFO, "specedit")


@pytest.fixture
def mask():
    """White in the upper left quarter."""
    pixels = np.zeros((128, 128), np.uint8)
    pixels[:64, :64] = 255
    return Image.fromarray(pixels)


def test_a_request_runs_with_the_servers_settings_and_its_own_mask(host, picture, mask, encoded, caplog):
    edited = host.request(picture(), edit_mask=encoded(mask), specedit={"keep_pixels": True})
    report = specedit.report(host.pipe)
    assert report.nfe == 3 and report.draft_steps == 0 and report.config.keep_pixels
    assert report.edit_mask[0, :2, :2].all() and not report.edit_mask[0, -1].any()
    source = torch.from_numpy(np.asarray(picture(), np.float32) / 255).permute(2, 0, 1)[None]
    assert torch.allclose(edited[..., 120:, 120:].float(), source[..., 120:, 120:], atol=1e-2)
    assert not torch.allclose(edited[..., :32, :32].float(), source[..., :32, :32], atol=1e-2)
    host.request(picture())
    assert not specedit.report(host.pipe).config.keep_pixels and specedit.report(host.pipe).draft_steps == 1


def test_a_field_that_the_model_does_not_offer_is_refused_and_the_next_request_runs(host, picture, monkeypatch):
    monkeypatch.setattr(type(installation_of(host.pipe).adapter), "encodes_pixels", False)
    with pytest.raises(ValueError, match="restore: expected 'full' or 'reference' for"):
        host.request(picture(), specedit={"restore": "pixels"})
    host.request(picture())
    assert specedit.report(host.pipe).nfe == 3


def test_steps_that_a_server_sends_leave_the_preset_alone_and_this_is_said(host, picture, caplog):
    host.request(picture())
    report = specedit.report(host.pipe)
    assert report.nfe == 3 and report.overruled_steps == report.stock_steps and report.overruled_steps in (28, 30)
    assert report.to_dict()["overruled_steps"] == report.overruled_steps
    said = [r.getMessage() for r in caplog.records if "NFE" in r.getMessage()]
    assert len(said) == 1 and f"the server's {report.overruled_steps} steps did not count" in said[0]
    host.request(picture(), steps=2)
    report = specedit.report(host.pipe)
    assert report.nfe == 2 and report.overruled_steps is None and "client asked for 2 steps" in caplog.text
    host.request(picture(), warms_up=True)
    assert specedit.report(host.pipe).nfe == 3


def test_a_preset_holds_for_one_request(host, picture, monkeypatch):
    monkeypatch.delenv("SPECEDIT_SERVER_SETTINGS")
    monkeypatch.setenv("SPECEDIT_SERVER_PRESET", "few-4")
    host.request(picture(), preset="lightning-6")
    assert specedit.report(host.pipe).preset == "lightning-6"
    host.request(picture())
    assert specedit.report(host.pipe).nfe == 4


BAD = {
    "preset": (dict(preset="tubro"), "expected one of .*turbo.*got 'tubro'"),
    "base64": (dict(edit_mask="no&base64"), "edit_mask: expected base64 of a picture file, got"),
    "no picture": (dict(edit_mask="AAAA"), "edit_mask: expected a picture"),
    "a path": (dict(edit_mask="mask.png"), "SPECEDIT_SERVER_FILES"),
    "field": (dict(specedit={"method": "steps"}), "specedit: expected any of threshold, .*got 'method'"),
    "value": (dict(specedit={"threshold": 9}), "threshold: expected"),
    "no object": (dict(specedit=[1]), "specedit: expected an object"),
}


@pytest.mark.parametrize("given, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_the_requests_error_and_the_next_request_runs(host, picture, given, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        host.request(picture(), **given)
    assert getattr(host, "ClientError", Exception) is Exception or isinstance(error.value, host.ClientError)
    host.request(picture(), steps=1)
    assert specedit.report(host.pipe).nfe == 1 and is_active(host.pipe)


def test_a_mask_has_the_pictures_proportions(host, picture, encoded):
    with pytest.raises(ValueError, match=r"edit_mask: expected the picture's size, 128 x 128, .*got 128 x 64"):
        host.request(picture(), edit_mask=encoded(Image.new("L", (128, 64), 255)))
    with pytest.raises(ValueError, match="at most 8192 px"):
        host.request(picture(), edit_mask=encoded(Image.new("1", (9000, 9000), 1)))
    with pytest.raises(ValueError, match="nothing to edit"):
        host.request(picture(), edit_mask=encoded(Image.new("L", (128, 128))))


def test_files_are_read_from_the_servers_folder_alone(host, picture, mask, tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    mask.save(tmp_path / "files" / "mask.png")
    mask.save(tmp_path / "outside.png")
    monkeypatch.setenv("SPECEDIT_SERVER_FILES", str(tmp_path / "files"))
    host.request(picture(), steps=1, edit_mask="mask.png")
    assert specedit.report(host.pipe).edit_mask is not None
    for name in ("../outside.png", str(tmp_path / "outside.png"), "gone.png"):
        with pytest.raises(ValueError, match="in the folder of SPECEDIT_SERVER_FILES, got"):
            host.request(picture(), edit_mask=name)


WRONG = {
    "PRESET": ("tubro", "SPECEDIT_SERVER_PRESET.*got 'tubro'"),
    "SETTINGS": ("{", "SPECEDIT_SERVER_SETTINGS: expected a JSON object"),
    "ENABLED": ("maybe", "SPECEDIT_SERVER_ENABLED: expected one of 1, .*got 'maybe'"),
    "FILES": ("/nowhere", "SPECEDIT_SERVER_FILES: expected a folder"),
    "PRESETS": ("turbo", "SPECEDIT_SERVER_PRESETS: expected one of .*did you mean 'PRESET'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_variables_stop_the_server_and_leave_the_pipeline(name, pipe, monkeypatch):
    value, message = WRONG[name]
    monkeypatch.setenv(f"SPECEDIT_SERVER_{name}", value)
    with pytest.raises((TypeError, ValueError), match=message):
        serving.install(pipe)
    assert not is_active(pipe)


def test_a_server_can_switch_it_off_and_other_pipelines_stay(pipe, monkeypatch, caplog):
    assert not serving.install(object()) and "does not serve object" in caplog.text
    monkeypatch.setenv("SPECEDIT_SERVER_ENABLED", "off")
    assert not serving.install(pipe) and not is_active(pipe)
    call = {"prompt": "x", "num_inference_steps": 4}
    serving.prepare(pipe, call, {}, asks_steps=False)
    assert call == {"prompt": "x", "num_inference_steps": 4}
    with pytest.raises(ValueError, match="preset: expected a pipeline with SpecEdit"):
        serving.prepare(pipe, call, {"preset": "turbo"}, asks_steps=False)


def test_a_call_that_runs_stock_gets_the_servers_steps_and_a_warning(host, picture, mask, caplog):
    host.pipe.transformer._is_cached = True
    host.request(picture(), edit_mask=mask)
    assert host.pipe.num_timesteps in (28, 30) and "the stock pipeline ran: cache-dit is enabled" in caplog.text
    assert "edit_mask not applied" in caplog.text


def test_requests_of_several_threads_keep_their_own_settings(host, picture):
    reports, errors = {}, []

    def ask(steps):
        try:
            host.request(picture(), steps=steps, specedit={"dilation": steps})
            reports[steps] = specedit.report(host.pipe)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(steps,)) for steps in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and {n: (r.nfe, r.config.dilation) for n, r in reports.items()} == {n: (n, n) for n in (1, 2, 3)}


def test_sglang_checks_requests_before_they_reach_a_worker(sglang, picture, encoded):
    with pytest.raises(ValueError, match="got 'tubro'"):
        sglang.check({"preset": "tubro"})
    with pytest.raises(ValueError, match="edit_mask: expected base64"):
        sglang.check({"edit_mask": "&&"})
    params = sglang.check({"preset": "turbo"})
    assert params.image_path is None and params.num_inference_steps == 30
    assert "num_inference_steps" not in params.build_request_extra()["explicit_fields"]
    asked = sglang.check({"preset": "turbo"}, num_inference_steps=12).build_request_extra()
    assert "num_inference_steps" in asked["explicit_fields"] and asked["diffusers_kwargs"] == {"preset": "turbo"}
    sglang.needs_image = True
    text = encoded(picture())
    assert sglang.check({"image": text}).image_path == [f"data:image/png;base64,{text}"]


def test_sglang_loads_a_pipeline_with_specedit(sglang):
    assert is_active(sglang.loaded())


def test_sglang_takes_a_picture_among_the_settings(sglang, picture, encoded):
    edited = sglang.request(None, image=encoded(picture()))
    assert torch.equal(edited, sglang.request(picture()))


def test_omnis_edits_endpoint_has_a_mask(omni, picture, mask):
    omni.request(picture(), mask_image=mask)
    assert specedit.report(omni.pipe).edit_mask is not None and specedit.report(omni.pipe).draft_steps == 0


def test_omni_has_every_pipeline_once_over_what_was_there(omni):
    names = {"FluxKontextPipeline", "QwenImageEditPlusPipeline", "Flux2KleinPipeline"}
    assert names <= {name for name, utils in omni.registry.items() if getattr(utils, "of_specedit", False)}
    utils = omni.registry["FluxKontextPipeline"]
    assert not getattr(utils.__mro__[1], "of_specedit", False)  # registering twice adds nothing


QUIET = """
import sys, specedit, specedit.integrations.sglang, specedit.integrations.vllm_omni
print([name for name in ("sglang", "vllm", "vllm_omni", "torch", "diffusers") if name in sys.modules])
"""


def test_plugins_import_neither_server_nor_torch():
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_entry_points_name_the_plugins():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {
        "sglang.multimodal_gen.plugins": {"specedit": "specedit.integrations.sglang:register"},
        "vllm_omni.general_plugins": {"specedit": "specedit.integrations.vllm_omni:register"},
    }
