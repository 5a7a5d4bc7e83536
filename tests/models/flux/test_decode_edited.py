"""decode="edited" with AutoencoderKL, whose group norms see the whole picture: near the whole decode."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

import specedit
from specedit.micro import scenes
from specedit.micro.loading import WEIGHTS
from specedit.models.shared import decode_boxes
from tests.api.common import QUICK
from tests.api.test_offload import offload_groups, offload_models

KEEP = dict(QUICK, keep_pixels=True, dilation=0)
SIDE = 512
CELL = 4  # latents


@pytest.fixture(scope="module")
def released_layout():
    """The released FLUX autoencoder's layers, of a sixteenth of the width."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 16, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=16, norm_num_groups=4,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval().requires_grad_(False)  # fmt: skip


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, 16, 64, 74, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def whole(released_layout, latents):
    """The whole decode."""
    return released_layout.decode(latents).sample.clamp(-1, 1)


@pytest.fixture
def all_squares(monkeypatch):
    """The whole picture is the one square that gives the statistics."""
    monkeypatch.setattr(decode_boxes, "squares", lambda x, side, every: x)


def cells(*places, batch=2):
    found = torch.zeros(batch, 16, 19, dtype=torch.bool)
    for sample, row, column in places:
        found[sample, row, column] = True
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "places",
    [
        [(0, 6, 4), (1, 2, 5), (1, 3, 5)],  # inside
        [(0, 0, 0), (0, 15, 18)],  # two boxes in corners, of which one holds half a cell; none in the other sample
    ],
)
def test_with_the_wholes_statistics_boxes_are_the_whole_decode(released_layout, latents, whole, all_squares, places):
    found = cells(*places)
    part, share = decode_boxes.decoded_part(released_layout, latents, found, CELL)
    pixels = found.repeat_interleave(8 * CELL, 1).repeat_interleave(8 * CELL, 2)[:, None, :, :592].expand_as(whole)
    assert decode_boxes.halo(released_layout) == 6 and part.shape == whole.shape and 0 < share < 0.4
    torch.testing.assert_close(part[pixels], whole[pixels], rtol=0, atol=1e-3)  # batches of two differ as much
    assert (part == 0).float().mean() > 0.5


@pytest.mark.slow  # bfloat16 is slow on many CPUs
def test_the_share_counts_boxes_halos_and_squares(released_layout):
    latents = torch.randn(2, 16, 64, 74)
    part, share = decode_boxes.decoded_part(
        copy.deepcopy(released_layout).bfloat16(), latents.bfloat16(), cells((0, 6, 4)), CELL
    )
    assert part.dtype == torch.bfloat16 and part.isfinite().all()
    assert share == pytest.approx(16 * 16 / (64 * 74 * 2) + 1 / 2 / 4)
    assert decode_boxes.decoded_part(released_layout, latents, cells(), CELL)[1] == 0


@pytest.mark.slow
def test_a_trained_autoencoder_comes_within_45_db():
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "kontext" / "vae").eval().requires_grad_(False)
    _, target, mask = scenes.draw([scenes.describe(702, "recolor")], SIDE, SIDE)
    found = F.max_pool2d(mask[:, None].float(), 8 * CELL)[:, 0] > 0
    latents = vae.encode(target * 2 - 1).latent_dist.mean
    part, share = decode_boxes.decoded_part(vae, latents, found, CELL)
    whole = vae.decode(latents).sample.clamp(-1, 1)
    pixels = found.repeat_interleave(8 * CELL, 1).repeat_interleave(8 * CELL, 2)
    error = ((part - whole) / 2).square().mean(1)[pixels].mean()
    assert share < 0.6 and -10 * error.log10() > 45


@pytest.fixture
def mask():
    made = np.zeros((SIDE, SIDE), dtype=np.uint8)
    made[96:192, 96:160] = 1
    return made


@pytest.mark.slow
def test_calls_decode_boxes_and_keep_the_other_pixels(pipe, edit, mask):
    images = {}
    for decode in ("full", "edited"):
        specedit.install(pipe, **KEEP, decode=decode)
        images[decode] = edit(pipe, (SIDE, SIDE), edit_mask=mask, output_type="pt")
    far = torch.ones(SIDE, SIDE, dtype=torch.bool)
    far[64:224, 64:192] = False
    assert images["edited"].isfinite().all() and not torch.equal(*images.values())
    assert torch.equal(images["edited"][..., far], images["full"][..., far])
    report = specedit.report(pipe)
    assert report.decoded_fraction == pytest.approx((12 + 8) * (8 + 8) / 64**2 + 1 / 4)


def change_nothing(pipe):
    pass


def offload_and_slice(pipe):
    offload_models(pipe)
    pipe.vae.enable_slicing()


def tile(pipe):
    pipe.vae.enable_tiling()


def compile_decode(pipe):
    pipe.vae.decode = pipe.vae.decode


def attend_above(pipe):
    pipe.vae.decoder.up_blocks.append(copy.deepcopy(pipe.vae.decoder.mid_block.attentions[0]))


@pytest.mark.parametrize(
    ("change", "boxes"),
    [(change_nothing, True), (offload_and_slice, True), (tile, False), (compile_decode, False), (attend_above, False)],
)
def test_what_decodes_boxes(pipe, change, boxes):
    for name in ("vae", "text_encoder", "text_encoder_2"):  # which pipelines share
        setattr(pipe, name, copy.deepcopy(getattr(pipe, name)))
    change(pipe)
    part = decode_boxes.decoded_part(pipe.vae, torch.randn(1, 4, 64, 64), cells((0, 6, 4), batch=1)[..., :16], CELL)
    assert (part is not None) == boxes


def test_groups_that_are_offloaded_decode_the_whole(pipe):
    pipe.vae = copy.deepcopy(pipe.vae)
    offload_groups(pipe)
    assert "offloaded" in decode_boxes.why_whole(pipe.vae)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "rows"), [(SIDE, 10), (256, 1)])
def test_large_edits_and_small_pictures_are_decoded_whole(pipe, edit, side, rows):
    mask = np.zeros((side, side), dtype=np.uint8)
    mask[: 32 * rows] = 1
    images = []
    for decode in ("full", "edited"):
        specedit.install(pipe, **KEEP, decode=decode)
        images.append(edit(pipe, (side, side), edit_mask=mask, output_type="pt"))
    assert torch.equal(*images) and specedit.report(pipe).decoded_fraction == 1
