"""The same seeds give the same pictures as when they were recorded: six presets, both restores, three families.

The presets' drafts and boundaries are those of the time.

`python -m pytest tests/models/test_recorded_pictures.py --record-pictures` writes the file anew. Rounding differs
between processors, so the hash of every bit is only compared on the processor that recorded it.
"""

import hashlib
import json
import platform
from pathlib import Path

import pytest
import torch

import specedit
from specedit.config import presets
from specedit.hardware import cpuinfo

FILE = Path(__file__).with_name("recorded_pictures.json")
FAMILIES = ("flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen", "longcat")))
THRESHOLD = dict(flux=1.6, qwen=1.15, longcat=1.6)  # of random weights: about a third of the cells
KIND = ("cpu family", "model", "stepping", "CPU implementer", "CPU part")
ARITHMETIC = ("sse", "ssse", "avx", "fma", "f16c", "bf16", "amx", "asimd", "sve", "fphp", "i8mm")  # of the flags
DRAFT_STEPS = {"quality": 8, "balanced": 8, "fast": 8, "turbo": 8, "lightning-8": 4, "lightning-6": 4}


def processor():
    """What rounding depends on: processors of the same name differ, and a virtual machine may hide instructions."""
    said = cpuinfo()
    kind = "/".join(said[name] for name in KIND if name in said)
    can = [word for word in (said.get("flags") or said.get("Features", "")).split() if word.startswith(ARITHMETIC)]
    flags = hashlib.sha256(" ".join(sorted(can)).encode()).hexdigest()[:8]
    return f"{said.get('model name') or platform.processor()}, {kind}, flags {flags}, torch {torch.__version__}"


@pytest.fixture
def make_family(request, picture):
    """Makes a pipeline of a family, and the arguments of one call of it."""

    def make(name):
        call = dict(image=picture(160, 128), prompt="make it red")
        sized = dict(height=160, width=128)
        if name == "flux":
            pipe = request.getfixturevalue("make_pipe")()
            return pipe, call | sized | dict(max_area=160 * 128, _auto_resize=False, max_sequence_length=16)
        if name == "qwen":
            pipe = request.getfixturevalue("make_qwen")()
            return pipe, call | sized | dict(negative_prompt="blue", true_cfg_scale=2.5)
        pytest.importorskip("diffusers.pipelines.longcat_image")
        return request.getfixturevalue("make_longcat")(), call | dict(negative_prompt="blue", guidance_scale=2.5)

    return make


@pytest.mark.parametrize("restore", ["full", "reference"])
@pytest.mark.parametrize("preset", DRAFT_STEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_the_recorded_ones(family, preset, restore, make_family, request):
    pipe, call = make_family(family)
    former = dict(draft_steps=DRAFT_STEPS[preset], boundaries=(0.7, 0.55))
    specedit.install(pipe, preset, restore=restore, threshold=THRESHOLD[family], dilation=0, **former)
    latents = pipe(**call, output_type="latent", generator=torch.Generator().manual_seed(7)).images.float()
    assert preset in presets and torch.isfinite(latents).all()
    chunks = latents.flatten().chunk(24)
    found = {
        "values": [round(float(chunk.mean()), 5) for chunk in chunks] + [round(float(latents.std()), 5)],
        "cells": specedit.report(pipe).edit_mask.int().flatten().tolist(),
        "sha256": {processor(): hashlib.sha256(latents.contiguous().numpy().tobytes()).hexdigest()},
    }
    key = f"{family}, {preset}, {restore}"
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {}
    if request.config.getoption("--record-pictures"):
        FILE.write_text(json.dumps(recorded | {key: found}, indent=1) + "\n")
        return
    assert found["cells"] == recorded[key]["cells"]
    torch.testing.assert_close(found["values"], recorded[key]["values"], rtol=0, atol=2e-4)
    assert found["sha256"][processor()] == recorded[key]["sha256"].get(processor(), found["sha256"][processor()])
