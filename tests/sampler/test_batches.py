"""Batches, generators, and sizes that are not square or even."""

import numpy as np
import pytest
import torch

import specedit
from specedit.layout import TokenGrid
from specedit.method.restore import feather
from tests.sampler.common import CENTRE, CORNER, QUICK, assert_two_single_runs, close, count_calls, generators, unpacked


@pytest.mark.parametrize("restore", ["full", "reference"])
def test_a_batch_of_two_masks_is_two_single_runs(pipe, edit, picture, restore):
    specedit.install(pipe, **QUICK, restore=restore)
    assert_two_single_runs(pipe, edit, picture, [CORNER, CENTRE])


def test_a_batch_equals_two_single_runs(pipe, edit, picture):
    specedit.install(pipe, **QUICK, selector="variance", dilation=0)
    pictures, prompts = [picture(seed=1), picture(seed=2)], ["make it red", "add a boat"]
    both = edit(pipe, image=pictures, prompt=prompts, generator=generators(3, 4))
    masks = specedit.report(pipe).edit_mask
    assert not torch.equal(masks[0], masks[1])
    for i in range(2):
        one = edit(pipe, image=pictures[i], prompt=prompts[i], generator=generators(3, 4)[i])
        assert torch.equal(specedit.report(pipe).edit_mask[0], masks[i])
        close(both[i], one[0])


def test_several_images_for_a_prompt(pipe, edit):
    specedit.install(pipe, **QUICK)
    both = edit(pipe, num_images_per_prompt=2, generator=generators(3, 4), edit_mask=CENTRE)
    assert both.shape == (2, 64, 16) and (both[0] - both[1]).abs().max() > 1e-2
    for i in range(2):
        close(both[i], edit(pipe, generator=generators(3, 4)[i], edit_mask=CENTRE)[0])


def reported(pipe):
    return specedit.report(pipe).edit_mask


def test_masks_belong_to_pictures_or_to_prompts(pipe, edit, picture):
    """Images of one prompt stand together, pictures are repeated over the batch; masks go with either."""
    specedit.install(pipe, **QUICK)
    prompts, pictures = ["make it red", "add a boat"], [picture(seed=1), picture(seed=2)]
    several = dict(num_images_per_prompt=2, edit_mask=[CORNER, CENTRE])
    edit(pipe, prompt=prompts, **several)
    of_prompts = reported(pipe)
    assert torch.equal(of_prompts[0], of_prompts[1]) and torch.equal(of_prompts[2], of_prompts[3])
    assert not torch.equal(of_prompts[0], of_prompts[2])
    edit(pipe, image=pictures, prompt=prompts, **several)
    assert torch.equal(reported(pipe), of_prompts[[0, 2, 0, 2]])
    edit(pipe, prompt=prompts, edit_mask=[np.stack([CORNER, CENTRE])])
    assert torch.equal(reported(pipe), of_prompts[[0, 2]])
    edit(pipe, num_images_per_prompt=2, edit_mask=[CORNER, CENTRE])
    assert torch.equal(reported(pipe), of_prompts[[0, 2]])
    with pytest.raises(ValueError, match="edit_mask: expected 1 mask or 4, one for each image, got 2"):
        edit(pipe, num_images_per_prompt=4, edit_mask=[CORNER, CENTRE])
    with pytest.raises(ValueError, match="1 mask or 2, one for each prompt or 6, one for each image, got 3"):
        edit(pipe, prompt=prompts, num_images_per_prompt=3, edit_mask=[CORNER] * 3)


def test_the_generator_alone_decides(pipe, edit):
    specedit.install(pipe, **QUICK)
    torch.manual_seed(1)
    first = edit(pipe, seed=5)
    torch.manual_seed(2)
    assert torch.equal(edit(pipe, seed=5), first)
    assert not torch.equal(edit(pipe, seed=6), first)
    assert torch.equal(edit(pipe, generator=generators(5)), first)  # a list of one is that one


def test_the_wrong_number_of_generators(pipe, edit):
    specedit.install(pipe, **QUICK)
    with pytest.raises(ValueError, match="list of generators of length 3"):
        edit(pipe, generator=generators(1, 2, 3))


@pytest.mark.parametrize("restore", ["full", "reference"])
@pytest.mark.parametrize("size", [(144, 176), (80, 272)])
def test_sizes_that_are_not_square_and_odd_in_tokens(pipe, edit, size, restore):
    specedit.install(pipe, **QUICK, restore=restore, selector="variance", dilation=0)
    grid = TokenGrid(size[0] // 16, size[1] // 16)
    latents = edit(pipe, size)
    assert latents.shape == (1, grid.tokens, 16) and latents.isfinite().all()
    report = specedit.report(pipe)
    assert report.score.shape == (1, *grid.shape) and report.edit_mask.shape == (1, *grid.coarse().shape)
    image = edit(pipe, size, output_type="pil")[0]
    assert image.size == (size[1], size[0])


@pytest.mark.parametrize("verify_at", ["full", "draft"])
@pytest.mark.parametrize("draft_scale", [2, 4])
def test_verification_on_an_odd_grid(pipe, edit, verify_at, draft_scale):
    specedit.install(pipe, **QUICK, verify_at=verify_at, draft_scale=draft_scale)
    assert edit(pipe, (144, 176)).isfinite().all()
    report = specedit.report(pipe)
    assert report.score.shape == (1, 9, 11) and report.edit_mask.shape == (1, 5, 6)
    assert report.score.isfinite().all() and report.score.max() > 0


@pytest.mark.parametrize("restore", ["full", "reference"])
def test_a_reference_of_another_size(pipe, edit, picture, restore):
    specedit.install(pipe, **QUICK, restore=restore, selector="variance", dilation=0)
    calls = count_calls(pipe)
    latents = edit(pipe, (128, 128), image=picture(96, 160))
    assert latents.shape == (1, 64, 16) and latents.isfinite().all()
    assert calls[4 + 2 * 3] == 2  # draft: 2 x 2 tokens beside 2 x 3
    if restore == "full":
        assert calls[64 + 60] == 2


def test_reference_restore_returns_the_references_latents(pipe, edit, start):
    noise, reference = start
    specedit.install(pipe, **QUICK, restore="reference")
    latents = unpacked(pipe, edit(pipe, edit_mask=CORNER))
    cells = specedit.report(pipe).edit_mask
    assert cells.sum() == 4
    weight = feather(cells, 4, 1, (16, 16))[:, None].expand_as(latents)
    torch.testing.assert_close(latents[weight == 0], reference[weight == 0], rtol=1e-5, atol=1e-5)
    assert (latents - reference)[weight == 1].abs().min() > 0


def test_reference_restore_without_any_mask_is_full(pipe, edit):
    # The uniform selector finds no edit; locking everything would return the input.
    specedit.install(pipe, steps=(1, 2, 0), restore="full", selector="uniform", uniform_stride=1)
    full = edit(pipe)
    specedit.install(pipe, steps=(1, 2, 0), restore="reference", selector="uniform")
    close(edit(pipe), full)
    assert specedit.report(pipe).edit_fraction == 1


def test_a_draft_that_shows_no_change_is_not_believed(pipe, edit):
    for restore, share in (("reference", 1), ("full", 0)):
        specedit.install(pipe, **QUICK, restore=restore, threshold=4.0)
        edit(pipe, num_images_per_prompt=2)
        report = specedit.report(pipe)
        assert report.edit_fraction == share and report.empty_drafts == report.to_dict()["missed"] == 2
        assert "; 2 of 2 drafts showed no change" in str(report)
        edit(pipe, edit_mask=CORNER)
        assert specedit.report(pipe).empty_drafts == 0 and "drafts" not in str(specedit.report(pipe)).splitlines()[0]


def test_nearly_everything_edited_is_everything(pipe, edit):
    mask = np.ones((4, 4))
    mask[3, 3] = 0
    specedit.install(pipe, **QUICK)
    edit(pipe, edit_mask=mask)
    done = specedit.report(pipe)
    assert done.edit_fraction == 15 / 16 and done.expand_fraction == 1  # what was asked, and what was refined
    mask[2:, 3] = 0
    edit(pipe, edit_mask=mask)
    assert specedit.report(pipe).expand_fraction < 1


@pytest.mark.parametrize("masks", [("all", "some"), ("some", "all")])
def test_samples_that_reach_a_stage_at_different_levels_keep_their_own(pipe, edit, picture, masks):
    kinds = {"all": np.ones((128, 128)), "some": CORNER}
    masks = [kinds[m] for m in masks]
    specedit.install(pipe, **QUICK)
    pictures, prompts = [picture(seed=1), picture(seed=2)], ["make it red", "add a boat"]
    both = edit(pipe, image=pictures, prompt=prompts, edit_mask=masks, generator=generators(3, 4))
    for i in range(2):
        one = edit(pipe, image=pictures[i], prompt=prompts[i], edit_mask=masks[i], generator=generators(3, 4)[i])
        close(both[i], one[0])


def test_a_stage_that_ends_above_where_its_layout_was_left(pipe, edit):
    specedit.install(pipe, steps=(1, 1, 1), boundaries=(0.5, 0.6), threshold=4.0, uniform_stride=0, draft_steps=1)
    assert torch.isfinite(edit(pipe)).all()


def test_keep_pixels_does_not_believe_a_draft_without_change_either(pipe, edit, picture):
    specedit.install(pipe, **QUICK, keep_pixels=True, threshold=4.0)
    image = np.asarray(edit(pipe, output_type="pil")[0])
    assert not np.array_equal(image, np.asarray(picture()))


def test_keep_pixels_keeps_even_the_little_that_a_large_mask_leaves(pipe, edit, picture):
    mask = np.ones((128, 128))
    mask[96:, 96:] = 0
    specedit.install(pipe, **QUICK, keep_pixels=True)
    image = np.asarray(edit(pipe, edit_mask=mask, output_type="pil")[0])
    assert np.array_equal(image[96:, 96:], np.asarray(picture())[96:, 96:])
