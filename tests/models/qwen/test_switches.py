"""Switches beyond the paper on Qwen: several references, texts of other lengths, and samples with their own masks."""

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline

import specedit
from specedit.layout import LayoutSet
from specedit.method import denoise

CORNER = np.zeros((128, 128), dtype=bool)
CORNER[:40, :70] = True
DOT = np.zeros((128, 128), dtype=bool)
DOT[70:, 100:] = True
STEPS = dict(steps=(2, 3, 2), draft_steps=2, threshold=1.15, dilation=0)
SWITCHES = [
    dict(draft_steps=0, restore="reference"), dict(locked="cached", restore="reference"),
    dict(locked="reference", restore="full"), dict(restore="pixels"), dict(reference_keep=0.15),
]  # fmt: skip
GUIDED = dict(negative_prompt="blue and dark", true_cfg_scale=2.5)


@pytest.mark.slow
@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_several_references(make_qwen, picture, switch):
    pipe = specedit.install(make_qwen(QwenImageEditPlusPipeline), **STEPS | switch)
    images = [picture(128, 128, 1), picture(96, 160, 2), picture(160, 96, 3)]

    def run():
        call = dict(image=images, prompt="make it red", height=128, width=128, output_type="latent") | GUIDED
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    first = run()
    assert first.isfinite().all() and torch.equal(run(), first) and specedit.report(pipe).nfe == 7


def test_several_references_compete(make_qwen, picture, monkeypatch):
    kept, shorten = [], denoise.shorten_reference

    def keep(group):
        before = group.reference_layout
        shorten(group)
        kept.append((before, group.reference_layout))

    monkeypatch.setattr(denoise, "shorten_reference", keep)
    pipe = specedit.install(make_qwen(QwenImageEditPlusPipeline), **STEPS, reference_keep=0.3)
    pipe(image=[picture(128, 128, 1), picture(96, 160, 2)], prompt="red", height=128, width=128, output_type="latent",
         edit_mask=CORNER)  # fmt: skip
    assert len(kept) == 3
    for before, after in kept:
        assert isinstance(after, LayoutSet) and len(after.layouts) == 2
        assert after.tokens == -(-3 * before.tokens // 10)


@pytest.mark.slow
@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_prompts_of_other_lengths_and_masks_of_their_own(make_qwen, picture, switch):
    """Every sample of a batch is what it is by itself."""
    pipe = specedit.install(make_qwen(), **STEPS | switch)
    images, prompts, masks = [picture(seed=1), picture(seed=2)], ["red", "make it large and blue"], [CORNER, DOT]

    def run(rows):
        generators = [torch.Generator().manual_seed(5 + row) for row in rows]
        return pipe(
            image=[images[row] for row in rows], prompt=[prompts[row] for row in rows], height=128, width=128,
            negative_prompt=["blue"] * len(rows), true_cfg_scale=2.5, output_type="latent", generator=generators,
            edit_mask=[masks[row] for row in rows],
        ).images  # fmt: skip

    both = run([0, 1])
    for row in range(2):
        torch.testing.assert_close(run([row])[0], both[row], rtol=2e-4, atol=2e-4)
