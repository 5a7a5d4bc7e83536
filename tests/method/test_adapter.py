"""The adapter protocol, and what the method asks of it."""

import pytest
import torch

import specedit
from specedit.method.adapter import Adapter
from specedit.method.schedule import stage_sigmas
from specedit.models.flux import FluxKontext


def test_an_adapter_without_predict_cannot_be_made():
    partial = type("Partial", (FluxKontext,), {"predict": Adapter.predict})
    with pytest.raises(TypeError, match=r"abstract.*predict"):
        partial()


def test_velocity_is_the_guided_prediction():
    class Two(FluxKontext):
        def predict(self, run, group, sigma, partial=None):
            return [torch.full((1,), sigma), torch.full((1,), group)]

        def guide(self, run, outputs):
            return run * outputs[0] + outputs[1]

    assert Two().velocity(2.0, 3.0, 0.5) == torch.tensor([4.0])


def test_draft_and_stages_follow_the_adapters_own_schedule(pipe, edit, monkeypatch):
    asked = []

    def sigmas(self, pipe, tokens, start, end, steps):
        asked.append((tokens, start, end, steps))
        return stage_sigmas(pipe.scheduler, 9 * tokens, start, end, steps)

    specedit.install(pipe, steps=(2, 0, 2), draft_steps=3, keep_pixels=True)
    stock = edit(pipe)
    monkeypatch.setattr(FluxKontext, "sigmas", sigmas)
    assert not torch.equal(edit(pipe), stock)
    assert [(tokens, steps) for tokens, _, _, steps in asked] == [(4, 3), (16, 2), (64, 2)]
    assert asked[0][1:3] == (1.0, 0.0)
