"""What attention derives from lengths and biases is planned once a stage, in every family, and changes nothing."""

from collections import Counter

import pytest
import torch

import specedit
from specedit.models.attention import contexts
from tests.models.whole_calls import CORNER, close
from tests.tiny_flux2 import LAYERS

ALIGNED = dict(rope="phase_aligned")
SIZE = dict(height=128, width=128)
GUIDED = dict(negative_prompt="blue", true_cfg_scale=2.5)
CASES = {  # fixture, arguments of the call, configuration
    "flux": ("make_pipe", dict(SIZE, max_area=128 * 128, _auto_resize=False, max_sequence_length=16), {}),
    "qwen": ("make_qwen", dict(SIZE, **GUIDED), {}),
    "qwen21": ("make_qwen21", dict(SIZE, output_resolution=128, **GUIDED), {}),
    "qwen21 cached": ("make_qwen21", dict(SIZE, output_resolution=128), dict(locked="cached")),
    "klein-KV": ("make_flux2", dict(SIZE, max_sequence_length=16, text_encoder_out_layers=LAYERS), {}),
}  # fmt: skip
CASES |= {f"{name} aligned": (*CASES[name][:2], ALIGNED) for name in ("flux", "qwen", "klein-KV")}


@pytest.fixture(params=CASES)
def edit(request, picture):
    """Latents of an edit with so many steps of a mixed stage."""
    fixture, call, config = CASES[request.param]
    make = request.getfixturevalue(fixture)
    if fixture == "make_flux2" and not hasattr(pytest.importorskip("diffusers"), "Flux2KleinKVPipeline"):
        pytest.skip("this diffusers has no FLUX.2-klein-KV")
    pipe = make("Flux2KleinKVPipeline") if fixture == "make_flux2" else make()

    def run(mixed):
        specedit.install(pipe, steps=(0, mixed, 0), restore="reference", uniform_stride=0, **config)
        seed = torch.Generator().manual_seed(0)
        return pipe(
            image=picture(128, 128),
            prompt="make it red",
            edit_mask=CORNER,
            output_type="latent",
            generator=seed,
            **call,
        ).images

    return run


@pytest.fixture
def counts(monkeypatch):
    """Plans that were made, and attention calls with one and without."""
    seen, plan, attention = Counter(), contexts.plan, contexts.mixed_attention

    def count_plan(*args, **kwargs):
        seen["plans"] += 1
        return plan(*args, **kwargs)

    def count_attention(*args, plan=None, **kwargs):
        seen["without" if plan is None else "with"] += 1
        return attention(*args, plan=plan, **kwargs)

    monkeypatch.setattr(contexts, "plan", count_plan)
    monkeypatch.setattr(contexts, "mixed_attention", count_attention)
    return seen


def test_a_stage_is_planned_once(edit, counts):
    edit(2)
    few = dict(counts)
    counts.clear()
    edit(5)
    assert counts["plans"] == few["plans"] > 0
    assert counts["with"] > few["with"] > 0 and not counts["without"]


def test_a_plan_changes_nothing(edit, monkeypatch):
    planned = edit(2)
    monkeypatch.setattr(contexts.Mixed, "with_plan", lambda self, *args, **more: self)
    monkeypatch.setattr(contexts.Packed, "with_plans", lambda self: self)
    monkeypatch.setattr(contexts.ByKernels, "planned_segments", lambda self, segments, dtype: segments)
    close(planned, edit(2))
