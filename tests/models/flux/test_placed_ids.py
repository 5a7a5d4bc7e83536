"""A stage's rotary tables are made once, and travel with the ids."""

import torch
from diffusers.models.transformers import transformer_flux

from specedit import SpecEditConfig
from specedit.layout import MixedLayout
from specedit.method.adapter import Run
from specedit.models.shared.placed_ids import PlacedIds, TablesHook
from specedit.testing.family import group_of
from tests.models.flux.common import random_like

TABLES = torch.rand(8, 4), torch.rand(8, 4)


def test_ids_joined_to_the_texts_keep_their_tables():
    ids = torch.rand(5, 3)
    placed, hook = PlacedIds.of(ids, TABLES), TablesHook(lambda ids: "made")
    assert hook(torch.cat((torch.zeros(3, 3), placed), dim=0)) is TABLES
    for other in (ids, placed + 1, placed[:2], torch.cat((torch.zeros(2, 3), placed))):
        assert type(other) is torch.Tensor and hook(other) == "made"
    assert torch.equal(placed, ids) and placed.dtype == ids.dtype and placed.ndim == 2


def test_a_subclass_of_tensor_stays_as_it_is():
    class Other(torch.Tensor):
        pass

    ids = torch.rand(5, 3).as_subclass(Other)
    assert PlacedIds.of(ids, TABLES) is ids


def test_a_stage_makes_its_tables_once(prepare, monkeypatch):
    adapter, pipe, state = prepare()
    made, make = [], transformer_flux.get_1d_rotary_pos_embed
    monkeypatch.setattr(
        transformer_flux, "get_1d_rotary_pos_embed", lambda *args, **more: made.append(1) or make(*args, **more)
    )
    for layout in (MixedLayout.all_coarse(state.grid), MixedLayout.all_fine(state.grid)):
        group, run = group_of(state, layout, random_like(layout)), Run(adapter, pipe, SpecEditConfig(), state)
        made.clear()
        first, second = (adapter.velocity(run, group, 0.5) for _ in range(2))
        assert len(made) == 3 and torch.equal(first, second)  # axes
