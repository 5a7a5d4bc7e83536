"""Fixtures of the tests in this folder: every family's inpainting pipeline, and calls of it."""

from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import specedit
from specedit.cost.flops import plan
from specedit.cost.tables import ModelCost
from specedit.method import sampler
from specedit.models.flux2.schedule import flux2_sigmas
from tests.models.planned import assert_as_planned
from tests.tiny_flux2 import LAYERS

SIZE = (96, 192)  # height, width
CORNER = (slice(0, 48), slice(96, 192))
NAMES = {
    "kontext": "FluxKontextInpaintPipeline", "qwen": "QwenImageEditInpaintPipeline",
    "klein": "Flux2KleinInpaintPipeline",
}  # fmt: skip


def mask_of(*corners, size=SIZE):
    mask = np.zeros(size, np.uint8)
    for corner in corners or (CORNER,):
        mask[corner] = 255
    return Image.fromarray(mask)


EVERYTHING = mask_of((slice(None), slice(None)))


def token_mask(mask=None):
    """(N,) bool: tokens that the mask covers."""
    pixels = torch.from_numpy(np.array(mask or mask_of())) > 127
    return pixels.reshape(SIZE[0] // 16, 16, SIZE[1] // 16, 16).any(3).any(1).flatten()


@dataclass
class Inpaint:
    """One family. make: makes equal pipelines. arguments: of a call. guided: what switches guidance on."""

    name: str
    make: Any
    arguments: dict[str, Any]
    guided: dict[str, Any]

    def __call__(self, pipe, seed=3, **change):
        """What the call returns; packed latents (B, N, C) unless another output type is asked for."""
        images = pipe(**self.arguments | change | dict(generator=torch.Generator().manual_seed(seed))).images
        if isinstance(images, torch.Tensor) and images.ndim == 4 and "output_type" not in change:
            return torch.nn.functional.pixel_unshuffle(images, 2).flatten(2).transpose(1, 2)
        return images


@pytest.fixture(params=list(NAMES))
def inpaint(request, picture):
    """Every family's inpainting."""
    name, (height, width) = request.param, SIZE
    if not hasattr(diffusers, NAMES[name]):
        pytest.skip(f"this diffusers has no {NAMES[name]}")
    cls = getattr(diffusers, NAMES[name])
    call = dict(
        image=picture(height, width), mask_image=mask_of(), prompt="make it red", strength=1.0, output_type="latent",
        num_inference_steps=4,
    )  # fmt: skip
    negative = dict(negative_prompt="blue and dark", true_cfg_scale=2.5)
    if name == "kontext":
        call |= dict(max_area=height * width, _auto_resize=False, max_sequence_length=16)
        make_pipe = request.getfixturevalue("make_pipe")
        return Inpaint(name, lambda **options: make_pipe(cls, **options), call, negative)
    if name == "qwen":
        make_qwen = request.getfixturevalue("make_qwen")
        return Inpaint(name, lambda **options: make_qwen(cls, **options), call, negative)
    call |= dict(max_sequence_length=16, text_encoder_out_layers=LAYERS, guidance_scale=1.0)
    make_flux2 = request.getfixturevalue("make_flux2")
    return Inpaint(name, lambda **options: make_flux2(NAMES[name], **options), call, dict(guidance_scale=2.5))


@pytest.fixture
def assert_planned(inpaint, pipe, monkeypatch):
    """Runs a call, and compares its report with the plan for the cells of its mask."""
    states, edit = [], sampler.edit
    monkeypatch.setattr(sampler, "edit", lambda run, mask: states.append(run.state) or edit(run, mask))

    def check(config, **call):
        inpaint(pipe, **call)
        report, texts = specedit.report(pipe), states[-1].texts
        klein = {} if inpaint.name != "klein" else dict(sigmas=flux2_sigmas)
        cost = ModelCost(
            pipe.transformer.config, texts[0], len(texts), scheduler=pipe.scheduler.config,
            negative_text_tokens=texts[-1], **klein,
        )  # fmt: skip
        cells = torch.ones(states[-1].grid.coarse().shape, dtype=torch.bool)
        cells = cells if report.expand_mask is None else report.expand_mask
        call = inpaint.arguments | call
        planned = plan(
            config, cost, *SIZE, cells=cells, drafts=False, strength=call["strength"],
            num_inference_steps=call["num_inference_steps"],
        )  # fmt: skip
        assert_as_planned(report, planned)
        assert (report.nfe, report.stock_steps) == (planned["nfe"], planned["stock_steps"])
        assert report.flops_ratio == pytest.approx(planned["flops_ratio"], rel=1e-12)
        return report

    return check


@pytest.fixture
def pipe(inpaint):
    return inpaint.make()
