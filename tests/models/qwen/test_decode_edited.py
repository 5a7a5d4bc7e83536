"""decode="edited": boxes around the edited cells, as the whole picture's decode has them."""

import copy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage

import specedit
from specedit.method import restore
from specedit.models.shared import decode_boxes
from specedit.models.shared.decode_boxes import Box, boxes_around
from tests.api.test_offload import offload_groups, offload_models, offload_modules
from tests.models.qwen.common import QUICK

KEEP = dict(QUICK, keep_pixels=True, dilation=0)
CELL = 4  # latents


@pytest.fixture(scope="module")
def vae(qwen_components):
    return copy.deepcopy(qwen_components["vae"])


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, 4, 1, 20, 38, generator=torch.Generator().manual_seed(0))  # the last cells are cut


def cells(*places, batch=2):
    found = torch.zeros(batch, 5, 10, dtype=torch.bool)
    for sample, row, column in places:
        found[sample, row, column] = True
    return found


@pytest.mark.parametrize(
    "places",
    [
        [(0, 2, 4), (1, 2, 5), (1, 3, 5)],  # inside
        [(0, 0, 0), (1, 4, 9)],  # in corners, of which one holds half a cell
        [(0, 0, 0), (0, 4, 9)],  # two boxes in one sample, none in the other
    ],
)
@torch.no_grad()
def test_boxes_are_the_whole_decodes_pixels(vae, latents, places):
    found = cells(*places)
    boxes, share = decode_boxes.plan(vae, found, CELL, 20, 38)
    part, whole = decode_boxes.decode(vae, latents, boxes), vae.decode(latents).sample[:, :, 0]
    pixels = found.repeat_interleave(8 * CELL, 1).repeat_interleave(8 * CELL, 2)[:, None, :, :304].expand_as(whole)
    assert part.shape == whole.shape and 0 < share < decode_boxes.LARGEST
    torch.testing.assert_close(part[pixels], whole[pixels], rtol=1e-4, atol=1e-5)
    assert (part == 0).float().mean() > 0.5


@torch.no_grad()
def test_the_released_autoencoders_layout_needs_a_wider_halo():
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(base_dim=4, z_dim=4, num_res_blocks=2, dim_mult=[1, 2, 4, 4]).eval()
    latents = torch.randn(1, 4, 1, 24, 24)
    found = torch.zeros(1, 6, 6, dtype=torch.bool)
    found[0, 2, 2] = True
    boxes, share = decode_boxes.plan(vae, found, CELL, 24, 24)
    part, whole = decode_boxes.decode(vae, latents, boxes), vae.decode(latents).sample[:, :, 0]
    box = boxes[0][0].times(8)
    assert decode_boxes.halo(vae) == 6 and share == (16 / 24) ** 2
    torch.testing.assert_close(box.of(part), box.of(whole), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_smaller_halo_would_not_reach(vae, latents, monkeypatch):
    found = cells((0, 2, 4), (1, 2, 4))
    reach = decode_boxes.halo(vae)
    monkeypatch.setattr(decode_boxes, "halo", lambda vae: reach - 1)
    boxes, _ = decode_boxes.plan(vae, found, CELL, 20, 38)
    box = boxes[0][0].times(8)
    part, whole = decode_boxes.decode(vae, latents, boxes), vae.decode(latents).sample[:, :, 0]
    assert not torch.allclose(box.of(part), box.of(whole), rtol=1e-4, atol=1e-5)


def test_cells_that_lie_apart_have_boxes_of_their_own():
    found = torch.zeros(8, 9, dtype=torch.bool)
    assert boxes_around(found, 2) == []
    found[0, 0] = found[1, 2] = found[7, 1] = found[6, 8] = True
    assert boxes_around(found, 2) == [Box(0, 2, 0, 3), Box(7, 8, 1, 2), Box(6, 7, 8, 9)]
    assert boxes_around(found, 8) == [Box(0, 8, 0, 9)]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_calls_return_what_the_whole_decode_gives(edit, output_type):
    mask = np.zeros((128, 128), dtype=np.uint8)
    mask[:32, :32] = 1
    pipe = edit.make()
    images = []
    for decode in ("full", "edited"):
        specedit.install(pipe, **KEEP, decode=decode)
        image = edit.run(pipe, edit_mask=mask, output_type=output_type)[0]
        images.append(torch.as_tensor(np.asarray(image, dtype=np.float32)))
    torch.testing.assert_close(*images, rtol=0, atol=1 if output_type == "pil" else 1e-4)
    report = specedit.report(pipe)
    assert report.decoded_fraction == report.to_dict()["decoded_fraction"] == 0.25
    assert "25% decoded" in str(report)


@pytest.mark.parametrize("why", ["large", "tiles", "compiled", "modules", "groups", "latent", "another"])
def test_what_needs_the_whole_picture_decodes_it(edit, monkeypatch, why):
    mask = np.zeros((128, 128), dtype=np.uint8)
    mask[:32, : 128 if why == "large" else 32] = 1
    pipe = edit.make()
    if why == "tiles":
        pipe.vae.enable_tiling()
    elif why == "compiled":
        pipe.vae.decode = pipe.vae.decode
    elif why == "another":
        monkeypatch.setattr(decode_boxes, "AutoencoderKLQwenImage", dict)
    elif why in ("modules", "groups"):
        monkeypatch.setattr(decode_boxes, "why_whole", watched := Watched(decode_boxes.why_whole))
        {"modules": offload_modules, "groups": offload_groups}[why](pipe)
    specedit.install(pipe, **KEEP, decode="edited")
    edit.run(pipe, edit_mask=mask, output_type="latent" if why == "latent" else "pt")
    assert specedit.report(pipe).decoded_fraction == 1
    if why in ("modules", "groups"):
        assert watched.said and "offloaded" in watched.said[0]


class Watched:
    def __init__(self, function):
        self.function, self.said = function, []

    def __call__(self, vae):
        self.said.append(self.function(vae))
        return self.said[-1]


@pytest.mark.slow
def test_model_offload_and_slices_decode_boxes(edit):
    mask = np.zeros((128, 128), dtype=np.uint8)
    mask[96:, 96:] = 1
    images = []
    for own in (False, True):
        pipe = edit.make()
        if own:
            offload_models(pipe)
            pipe.vae.enable_slicing()
        specedit.install(pipe, **KEEP, decode="edited" if own else "full")
        images.append(edit.run(pipe, edit_mask=mask, output_type="pt", num_images_per_prompt=2))
    assert specedit.report(pipe).decoded_fraction == 0.25
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)


def test_pixels_outside_the_cells_do_not_show():
    source, images = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
    found = torch.zeros(1, 2, 2, dtype=torch.bool)
    found[0, 0, 0] = True
    other = images.clone()
    other[..., 32:, :] = other[..., :, 32:] = 0
    kept = [restore.keep_pixels(one, source, found, 32, "pt") for one in (images, other)]
    assert torch.equal(*kept)


def test_a_session_shows_what_it_shows_of_the_whole_decode(edit):
    """Pixels beside a box, which were not decoded, are no change of the picture."""
    mask = np.zeros((128, 128), dtype=np.uint8)
    mask[:32, :32] = 1
    pipe, shown = edit.make(), []
    for decode in ("full", "edited"):
        specedit.install(pipe, **KEEP, decode=decode)
        session = specedit.Session(pipe, edit.call(128, 128)["image"])
        generator = torch.Generator().manual_seed(0)
        image = session.edit("make it red", edit_mask=mask, height=128, width=128, generator=generator)
        shown.append(np.asarray(image, dtype=np.float32))
    assert specedit.report(pipe).decoded_fraction == 0.25
    np.testing.assert_allclose(*shown, atol=1)


def test_only_with_kept_pixels():
    with pytest.raises(ValueError, match=r"decode: expected 'full' without keep_pixels.*got 'edited'"):
        specedit.SpecEditConfig(decode="edited")
    with pytest.raises(ValueError, match="decode: expected one of 'full', 'edited', got 'crop'"):
        specedit.SpecEditConfig(decode="crop", keep_pixels=True)
