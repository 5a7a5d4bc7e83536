"""Several references, each on its own grid."""

import numpy as np
import pytest
import torch

import specedit
from specedit import SpecEditConfig
from specedit.layout import GridSet, LayoutSet, MixedLayout, TokenGrid
from specedit.models.qwen import edit as qwen
from specedit.models.qwen.sizes import nearest_shapes
from specedit.testing.family import mixed_layout
from tests.models.qwen.common import GUIDED, QUICK, close, velocity


def test_several_references_each_on_its_own_grid(plus, monkeypatch):
    pipe = plus.make()
    adapter, state = plus.prepare(pipe, (128, 128))
    grids = state.reference_grid.grids
    assert isinstance(state.reference_grid, GridSet) and len(set(grids)) == 2 and grids[1] == state.grid
    assert torch.equal(state.aligned, state.reference[:, grids[0].tokens :])
    layout = mixed_layout(state.grid)
    beside = state.beside(layout)
    assert isinstance(beside, LayoutSet) and [one.picture for one in beside.layouts] == list(grids)
    seen = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda **kwargs: seen.append(kwargs) or forward(**kwargs))
    velocity(adapter, pipe, state, layout, SpecEditConfig())
    assert seen[0]["hidden_states"].shape[1] == layout.tokens + sum(one.tokens for one in beside.layouts)
    coarse = MixedLayout.all_coarse(state.grid)
    velocity(adapter, pipe, state, coarse, SpecEditConfig())
    # 6 x 12 tokens, one row below the output's first: their cells are the output's, 4 rows of them.
    assert seen[1]["hidden_states"].shape[1] == 16 + 4 * 6 + 16


@pytest.mark.slow
def test_several_references_through_every_stage(plus):
    stock = plus.run(plus.make(), num_inference_steps=2, **GUIDED)
    pipe = specedit.install(plus.make(), steps=(0, 0, 2))
    close(plus.run(pipe, **GUIDED), stock)
    for restore in ("full", "reference"):
        specedit.install(pipe, restore=restore, **QUICK)
        assert plus.run(pipe, **GUIDED).shape == stock.shape
    report = specedit.report(pipe)
    assert [stage.name for stage in report.stages if stage.steps] == ["draft", "coarse", "mixed"]


def test_locked_cells_take_the_aligned_reference(plus):
    pipe = specedit.install(plus.make(), restore="reference", **QUICK)
    mask = np.zeros((128, 128), dtype=np.uint8)
    mask[:32, :32] = 1
    tokens = plus.run(pipe, edit_mask=mask)
    _, state = plus.prepare(plus.make(), (128, 128))
    kept = torch.ones(8, 8, dtype=torch.bool)
    kept[:2, :2] = False
    assert torch.equal(tokens[0, kept.flatten()], state.aligned[0, kept.flatten()])


def test_the_aligned_reference_has_the_outputs_shape():
    square = TokenGrid(64, 64)
    assert nearest_shapes([(1024, 1024), (768, 1344)], square) == [0]
    assert nearest_shapes([(768, 1344), (1024, 1024)], square) == [1]
    assert nearest_shapes([(1024, 1024), (768, 1344), (512, 512)], square) == [0, 2]
    assert nearest_shapes([(1344, 768), (768, 1344), (800, 1312)], TokenGrid(48, 84)) == [1]
    assert nearest_shapes([(512, 1024)], square) == [0]


def test_among_pictures_of_equal_shape_the_last_is_edited_with_a_warning(plus, picture, monkeypatch):
    said = []
    monkeypatch.setattr(qwen.logger, "warning", said.append)
    first, last = picture(128, 128, seed=3), picture(128, 128)
    _, state = plus.prepare(plus.make(), image=[first, picture(64, 128), last], true_cfg_scale=1.0)
    assert said == ["pictures 1, 3 have one shape; SpecEdit takes the last of them for the one being edited"]
    _, alone = plus.prepare(plus.make(), image=[last], true_cfg_scale=1.0)
    close(state.aligned, alone.aligned)
    assert len(said) == 1


def test_output_follows_the_last_picture(plus, picture):
    pipe = plus.make()
    images = [picture(128, 64), picture(64, 128)]
    stock = pipe(image=images, prompt="a", num_inference_steps=1, output_type="np").images
    adapter, state = plus.prepare(pipe, image=images, height=None, width=None)
    assert (16 * state.grid.height, 16 * state.grid.width) == stock.shape[1:3]
    assert state.reference_grid.grids[1] == state.grid and state.conditioning.source.shape[-2:] == stock.shape[1:3]
