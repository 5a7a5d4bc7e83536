"""Edits whose output has another grid than the picture: cropped and padded by position, never stretched."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import specedit
from specedit import SpecEditConfig
from specedit.layout import MixedLayout, TokenGrid
from specedit.method import draft as drafts
from specedit.method import selectors as select
from specedit.method.adapter import Run
from specedit.method.restore import feather
from specedit.models import flux
from specedit.models.qwen.positions import reference_offset
from specedit.placement import Placement
from tests.api.test_sizes import QUICK, kontext, qwens, random_shapes  # noqa: F401
from tests.conftest import make_picture

AREA = 128 * 128


def corner(height, width):
    """A mask in the lower right corner of a picture."""
    mask = np.zeros((height, width), dtype=bool)
    mask[3 * height // 4 :, 3 * width // 4 :] = True
    return mask


def check_kept(pipe, family, image, edited=0, **call):
    """Every pixel outside the feathered mask is the picture's own, as the model takes it, at the same position."""
    pictures = image if isinstance(image, list) else [image]
    _, state = family.prepare(family.make(), image=image, **call)
    place = state.placements[edited]
    width, height = 16 * place.reference.width, 16 * place.reference.height
    taken = np.asarray(pictures[edited].resize((width, height), Image.Resampling.LANCZOS))
    mask = corner(*np.asarray(pictures[edited]).shape[:2])
    out = np.asarray(family.run(pipe, image=image, edit_mask=mask, output_type="pil", **call)[0])
    cells = specedit.report(pipe).edit_mask
    weight = feather(cells, 32, 8, out.shape[:2])[0].numpy()
    rows, columns = (weight == 0).nonzero()
    at = rows - 16 * place.row, columns - 16 * place.col
    assert len(rows) and min(a.min() for a in at) >= 0 and at[0].max() < height and at[1].max() < width
    assert np.array_equal(out[rows, columns], taken[at])
    assert (out[weight == 1] != np.asarray(specedit.report(pipe).source)[weight == 1]).any()
    return place


@pytest.mark.slow
def test_kontexts_rules_keep_every_pixel_at_its_place(kontext):  # noqa: F811
    pipe = specedit.install(kontext.make(), keep_pixels=True, **QUICK)
    differ = 0
    for n, (width, height) in enumerate(random_shapes()):
        call = dict(height=height, width=width, max_area=AREA)
        output = TokenGrid(*(side // 16 for side in flux.FluxKontext._output_size(pipe, call, 16)))
        taken = flux.preferred_size(height // 16 * 16, width // 16 * 16, 16)
        place = Placement(output, TokenGrid(*(side // 16 for side in taken)))
        differ += not place.is_same
        index = torch.arange(taken[0] * taken[1]).view(1, 1, *taken)
        shown = place.place_pixels(index, 16)[0, 0]
        rows, columns = (min(a, b) for a, b in zip(taken, shown.shape, strict=True))
        assert torch.equal(shown[:rows, :columns], index[0, 0, :rows, :columns])
        if n % 100 == 0:
            assert check_kept(pipe, kontext, make_picture(height, width, n), **call) == place
    assert differ > 100


@pytest.mark.slow
def test_qwens_rules_keep_every_pixel_at_its_place(qwens):  # noqa: F811
    family, odd = qwens[0], 0
    pipe = specedit.install(family.make(), keep_pixels=True, **QUICK)
    for n, (width, height) in enumerate(random_shapes()):
        scale = (AREA * (1, 0.7, 1.6)[n % 3] / (width * height)) ** 0.5
        call = dict(height=round(height * scale), width=round(width * scale))
        output = TokenGrid(call["height"] // 16, call["width"] // 16)
        given = specedit.size_for(pipe, torch.zeros(1).expand(3, height, width))
        taken = TokenGrid(given["height"] // 16, given["width"] // 16)
        row, col = reference_offset(output, taken, True)
        place = Placement(output, taken, row, col)
        odd += bool(row % 2 or col % 2)
        # The middle is the middle of both, to within the token by which an odd side has none.
        for at, n_out, n_ref in ((row, output.height, taken.height), (col, output.width, taken.width)):
            assert abs(at + n_ref / 2 - n_out / 2) <= 0.5
        if n % 100 == 0:
            assert check_kept(pipe, family, make_picture(height, width, n), **call) == place
    assert odd > 50


@pytest.mark.slow
@pytest.mark.parametrize("size", [(128, 128), (144, 112), (64, 64), (192, 160)])
def test_plus_restores_from_the_edited_picture_where_it_lies(qwens, size):  # noqa: F811
    """At another scale too: the model copies by position, so a smaller output shows the picture's middle."""
    family = qwens[1]
    pipe = specedit.install(family.make(), keep_pixels=True, restore="reference", **QUICK)
    images = [make_picture(64, 128, 3), make_picture(160, 160)]
    call = dict(height=size[0], width=size[1])
    if size == (64, 64):  # whose mask lies where nothing is shown
        with pytest.raises(ValueError, match="edit_mask: expected nonzero pixels on the output"):
            check_kept(pipe, family, images, edited=1, **call)
        images[1] = images[1].crop((0, 0, 160, 160))
        mask = np.zeros((160, 160))
        mask[70:75, 70:75] = 1
        out = np.asarray(family.run(pipe, image=images, edit_mask=mask, output_type="pil", **call)[0])
        taken = np.asarray(images[1].resize((128, 128), Image.Resampling.LANCZOS))
        assert np.array_equal(out[32:], taken[64:96, 32:96])
        return
    check_kept(pipe, family, images, edited=1, **call)


def test_a_picture_of_the_models_size_is_kept_to_the_bit(kontext):  # noqa: F811
    """What the model takes as it is comes back as it is, cropped."""
    pipe = specedit.install(kontext.make(), keep_pixels=True, **QUICK)
    values = torch.rand(1, 3, 160, 96, generator=torch.Generator().manual_seed(0))
    call = dict(height=144, width=112, max_area=144 * 112, _auto_resize=False, output_type="pt")
    out = kontext.run(pipe, image=values, edit_mask=corner(160, 96), **call)
    assert torch.equal(out[..., :96, :64], values[..., :96, :64])
    assert specedit.report(pipe).edit_mask[0].int().tolist() == [[0, 0, 0, 1]] * 3 + [[0, 0, 1, 1]] * 2


@pytest.mark.slow
def test_what_the_picture_does_not_cover_is_edited(kontext):  # noqa: F811
    """Whether a mask or a draft says what else is."""
    call = dict(height=128, width=128, max_area=AREA, _auto_resize=False)
    for mask in (corner(96, 128)[::-1], None):
        for restore in ("full", "reference"):
            pipe = specedit.install(kontext.make(), restore=restore, threshold=3.9, dilation=0, **QUICK)
            image = make_picture(80, 128)
            latents = kontext.run(pipe, image=image, edit_mask=mask, **call)
            report = specedit.report(pipe)
            assert report.edit_mask[0, 2:].all() and report.expand_mask[0, 2:].all()  # rows 64 to 128 of which 80 exist
            _, state = kontext.prepare(kontext.make(), image=image, **call)
            if mask is not None:
                assert not report.edit_mask[0, :2, :3].any()
            if mask is not None and restore == "reference":
                kept = slice(0, 4 * 8)
                same = (latents == state.aligned).view(8, 8, 16)[:4, :6]
                assert same.all() and (latents != state.aligned)[0, kept.stop :].any()


def test_a_wider_picture_is_compared_as_its_crop_is(kontext):  # noqa: F811
    """Latents make it exact: an autoencoder would look beyond the edge of the crop."""
    wide = torch.randn(1, 4, 32, 34, generator=torch.Generator().manual_seed(0))
    pipe, call = kontext.make(), dict(height=256, width=256, max_area=256 * 256)
    adapter, state = kontext.prepare(pipe, image=wide, **call)
    _, crop = kontext.prepare(pipe, image=wide[..., :32].contiguous(), **call)
    assert torch.equal(state.aligned, crop.aligned) and state.uncovered_cells is None
    draft = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(1))
    for verify_at in ("draft", "full"):
        config = SpecEditConfig(verify_at=verify_at)
        with torch.no_grad():
            results = [
                select.select(Run(adapter, pipe, config, each), draft, TokenGrid(4, 4)) for each in (state, crop)
            ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_wider_picture_keeps_the_pixels_that_its_crop_keeps(kontext):  # noqa: F811
    pipe = specedit.install(kontext.make(), keep_pixels=True, **QUICK)
    wide = make_picture(128, 144)
    call = dict(height=128, width=128, max_area=AREA, _auto_resize=False, output_type="pil")
    outs, masks = [], []
    for width in (144, 128):
        mask = np.zeros((128, width), dtype=bool)
        mask[:40, :40] = True
        outs.append(np.asarray(kontext.run(pipe, image=wide.crop((0, 0, width, 128)), edit_mask=mask, **call)[0]))
        masks.append(specedit.report(pipe).edit_mask)
    assert torch.equal(*masks) and masks[0].sum() == 4
    assert np.array_equal(outs[0][64:], outs[1][64:]) and np.array_equal(outs[0][:, 64:], outs[1][:, 64:])
    assert np.array_equal(outs[0][64:], np.asarray(wide)[64:, :128])


@pytest.mark.parametrize("verify_at", ["draft", "full"])
@pytest.mark.parametrize("side", [80, 96, 112])
def test_a_draft_that_is_the_picture_scores_nothing_where_there_is_one(kontext, verify_at, side):  # noqa: F811
    """Beyond the picture the draft is compared with itself, whatever it shows there."""
    pipe = kontext.make()
    call = dict(height=128, width=128, max_area=AREA, _auto_resize=False)
    adapter, state = kontext.prepare(pipe, image=make_picture(side, 128), **call)
    draft = drafts.shrink(state.aligned, state.grid, 2)[0].clone()
    draft[:, -4:] = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(1))  # rows 96 to 128
    config = SpecEditConfig(verify_at=verify_at, draft_scale=2)
    with torch.no_grad():
        score, _ = select.select(Run(adapter, pipe, config, state), draft, TokenGrid(4, 4))
        changed = draft.clone()
        changed[:, :2] *= -1
        more, _ = select.select(Run(adapter, pipe, config, state), changed, TokenGrid(4, 4))
    assert score.isfinite().all() and (more - score)[0, :2, :4].mean() > 0.01
    if verify_at == "draft" and side == 96:  # exact: nothing is blurred, and no cell is covered in part
        assert score.abs().max() < 1e-5


def test_small_references_keep_their_place(qwens):  # noqa: F811
    """Centred by themselves, as small images, they would lie by up to a token beside it."""
    family = qwens[0]
    _, state = family.prepare(family.make(), image=make_picture(128, 128), height=144, width=112)
    place = state.placement
    assert (place.row, place.col) == (1, 0) and place.reference == TokenGrid(8, 8)
    coarse = state.beside(MixedLayout.all_coarse(state.grid))  # cells of rows 0, 1 + 2, ... 7 of the reference
    assert coarse.grid.coarse() == TokenGrid(5, 4) and torch.equal(coarse.positions, TokenGrid(5, 4).positions())
    small = state.beside(MixedLayout.all_fine(state.grid.coarse(4)), 4)
    assert torch.equal(small.positions, TokenGrid(3, 2).positions())


def test_a_crop_warns_once_for_each_pair_of_sizes(kontext):  # noqa: F811
    pipe = specedit.install(kontext.make(), **QUICK)
    call = dict(height=128, width=112, max_area=128 * 112, _auto_resize=False)
    said = (
        r"the output is 112 x 128 px and the model takes the picture at 160 x 96 px: the output shows its columns 0 to "
        r"112 and rows 0 to 96, and 25% of the output lies beyond it and is edited; specedit.size_for\(pipe, picture\)"
    )
    with pytest.warns(UserWarning, match=said) as heard:
        kontext.run(pipe, image=make_picture(96, 160), **call)
    assert heard[0].filename == __file__  # the first line outside the package
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kontext.run(pipe, image=make_picture(96, 160, 1), **call)
    with pytest.warns(UserWarning, match="takes the picture at 176 x 128 px: .* columns 0 to 112 and rows 0 to 128;"):
        kontext.run(pipe, image=make_picture(128, 176), **call)
