"""Edits on another device than the host's: nothing is left behind, and no step waits for the host.

The device is one that is not there (tests/pretend.py). It stays with the process, so `test_another_device` runs this
file again in one of its own.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextInpaintPipeline
from PIL import Image

import specedit
from specedit import micro
from specedit.methods import Bottleneck, Fresco, Ralu, Speed
from specedit.micro.loading import WEIGHTS
from specedit.micro.scenes import sample
from tests.small_training import shrink
from training.micro import train, train_editor, train_vae
from training.micro.family_kontext import KONTEXT
from training.micro.loop import Settings

HERE = os.environ.get("SPECEDIT_PRETEND") == "1"
if HERE:
    from tests import pretend

inside = pytest.mark.skipif(not HERE, reason="runs in a process of its own")
SIZE = 96
MASK, OTHER = np.zeros((2, SIZE, SIZE), dtype=bool)
MASK[:40, :50] = OTHER[50:, 60:] = True
QUICK = dict(steps=(1, 3, 1), draft_steps=1)
MODELS = ("kontext", "qwen")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(HERE, reason="this is the process of its own")
@pytest.mark.parametrize("chosen", ["not thorough", pytest.param("thorough", marks=pytest.mark.thorough)])
def test_another_device(chosen):
    pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch takes no device written in Python")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen, __file__],
        cwd=Path(__file__).parents[1], env={**os.environ, "SPECEDIT_PRETEND": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.fixture(scope="module")
def pipes(shallow_weights):
    """Of each editor, with one block of each kind, one on the host and one on the device."""
    made = {}
    for name in MODELS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(micro.load.__globals__, "WEIGHTS", shallow_weights)
            made[name] = micro.load(name), pretend.move(micro.load(name))
        for pipe in made[name]:
            pipe.set_progress_bar_config(disable=True)
    return made


def edit(pipe, name, settings, *, images=1, **more):
    """Latents of one call with SpecEdit, on the host, and the report."""
    specedit.install(pipe, **settings if "method" in settings else QUICK | settings)
    tasks = [sample(seed, SIZE) for seed in range(images)]
    call = micro.arguments(tasks[0].source, name) | {"output_type": "latent"} | more
    with pretend.device():
        out = pipe(
            image=[task.source for task in tasks] if images > 1 else tasks[0].source,
            prompt=[task.prompt for task in tasks] if images > 1 else tasks[0].prompt,
            generator=torch.Generator().manual_seed(3), **call,
        ).images  # fmt: skip
        report = specedit.report(pipe)
    specedit.uninstall(pipe)
    assert not isinstance(report.edit_mask, pretend.Pretended)
    return out.held if isinstance(out, pretend.Pretended) else out, report


@inside
def test_the_device_does_not_mix_with_the_host():
    here = torch.ones(3)
    with pretend.device():
        there = here.to(pretend.NAME)
        assert there.device.type == pretend.NAME and (there + 1).cpu().tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="expected tensors on one device"):
            there + here
        assert there[torch.tensor([0])].tolist() == [1]
        with pytest.raises(RuntimeError, match="expected tensors on one device"):
            here[torch.tensor([0], device=pretend.NAME)]
        with pytest.raises(TypeError, match="another device"):
            np.asarray(there)
        pretend.waits.clear()
        assert there.sum().item() == 3 and sum(pretend.waits.values()) == 1


WATCHED = dict(edit_mask=MASK, callback_on_step_end=lambda pipe, i, t, given: {"latents": 1.01 * given["latents"]})
OF_EACH_MODEL = [  # what an adapter does in its own way
    ({}, {}),
    ({}, dict(images=2, edit_mask=[MASK, OTHER])),
    ({"rope": "phase_aligned"}, dict(images=2, edit_mask=[MASK, OTHER])),
    ({"attention": "stock"}, dict(edit_mask=MASK)),
    ({"reference_refresh": 2}, dict(edit_mask=MASK, num_images_per_prompt=2)),
]
OF_ONE = [  # what does not know the model
    ({"restore": "reference"}, {}),
    ({"verify_at": "full"}, {}),
    ({"selector": "edges"}, {}),
    ({"selector": "variance", "keep_pixels": True}, {}),
    ({"restore": "reference", "keep_pixels": True}, dict(edit_mask=MASK, output_type="pt")),
    ({"draft_condition": "small"}, {}),
    ({}, WATCHED),
    *(({"steps": (0, 6, 0), "forecast": f}, dict(edit_mask=MASK)) for f in ("taylor", "freqca", "foca")),
]


@inside
@pytest.mark.parametrize(
    ("name", "settings", "call"),
    [(name, *case) for name in MODELS for case in OF_EACH_MODEL]
    + [(MODELS[i % 2], *case) for i, case in enumerate(OF_ONE)],
    ids=lambda given: "-".join(map(str, given)) or "none" if isinstance(given, dict) else given,
)
def test_an_edit_is_the_hosts(pipes, name, settings, call):
    host, other = (edit(pipe, name, settings, **call) for pipe in pipes[name])
    torch.testing.assert_close(other[0], host[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(other[1].edit_mask, host[1].edit_mask)
    assert other[1].flops == host[1].flops


@inside
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_an_inpainting_edit_is_the_hosts(pipes, strength):
    call = dict(mask_image=Image.fromarray(MASK), strength=strength, num_inference_steps=7)
    made = []
    for pipe in pipes["kontext"]:
        inpaint = FluxKontextInpaintPipeline(**pipe.components)
        inpaint.set_progress_bar_config(disable=True)
        made.append(edit(inpaint, "kontext", {}, **call))
    (host, report), (other, others) = made
    torch.testing.assert_close(other, host, rtol=1e-4, atol=1e-4)
    assert torch.equal(others.edit_mask, report.edit_mask) and others.flops == report.flops


@inside
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "method"),
    [("kontext", Ralu((1, 2, 1))), ("qwen", Fresco((2, 1, 1))), ("kontext", Bottleneck((1, 2, 1))), ("qwen", Speed(4))],
    ids=str,
)
def test_another_methods_edit_is_the_hosts(pipes, name, method):
    host, other = (edit(pipe, name, {"method": method}) for pipe in pipes[name])
    torch.testing.assert_close(other[0], host[0], rtol=1e-4, atol=1e-4)
    assert (other[1].flops, other[1].expand_fraction) == (host[1].flops, host[1].expand_fraction)


@inside
@pytest.mark.thorough
@pytest.mark.parametrize("method", [Ralu, Fresco, partial(Fresco, select="edges"), Bottleneck])
def test_no_step_of_another_method_waits_for_the_host(pipes, method, monkeypatch):
    # Canny's loop ends when the picture's edges do, which differs from picture to picture.
    monkeypatch.setattr("specedit.methods.resolution.canny", lambda image: image[:, 0] > 0.5)
    counts = []
    for steps in ((1, 2, 2), (2, 4, 4)):
        pretend.waits.clear()
        edit(pipes["kontext"][1], "kontext", {"method": method(steps)}, callback_on_step_end=lambda *_: {})
        counts.append(dict(pretend.waits))
    assert counts[0] and counts[0] == counts[1]


@inside
@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, case) for name in MODELS for case in ({}, {"rope": "phase_aligned"}, {"reference_refresh": 2})]
    + [("kontext", {"forecast": "foca"}), ("qwen", {"forecast": "freqca"})],
    ids=str,
)
def test_no_step_waits_for_the_host(pipes, name, settings):
    """More steps bring no more of what makes host and device wait for each other."""
    counts = []
    for steps in ((4, 4, 4), (6, 6, 6)):
        pretend.waits.clear()
        # Who watches the latents need not wait either.
        watched = dict(edit_mask=MASK, callback_on_step_end=lambda *_: {})
        edit(pipes[name][1], name, settings | {"steps": steps}, **watched)
        counts.append(dict(pretend.waits))
    assert counts[0] and counts[0] == counts[1]


@inside
@pytest.mark.thorough
@pytest.mark.parametrize("changes", [{}, {"start": "kontext"}], ids=str)
def test_training(tmp_path, monkeypatch, changes):
    """Every part of it, from nothing and going on."""
    for half, what in ((KONTEXT, "build"), (KONTEXT.editor, "load")):
        monkeypatch.setitem(vars(half), what, pretend.on_the_host(getattr(half, what)))
    monkeypatch.setitem(vars(KONTEXT), "save", lambda pipe, folder: None)  # what is not there has no storage
    for module in (train_editor, train_vae):
        monkeypatch.setattr(module, "write", lambda state, path: None)
    shrink(monkeypatch, tasks=2)
    settings = Settings(
        out=tmp_path, model="kontext", device=pretend.NAME, steps=2, largest=64,
        **{option: WEIGHTS / folder for option, folder in changes.items()},
    )  # fmt: skip
    with pretend.device():
        pipe = train.train(settings)
        moved = [p for part in (pipe.transformer, pipe.vae) for p in part.parameters()]
        assert {p.device.type for p in moved} == {pretend.NAME} and all(p.isfinite().all() for p in moved)
