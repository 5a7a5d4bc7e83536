"""What a plan says of weights that only make modulation."""

import diffusers
import pytest
import torch

from specedit.cost import flops, roofline
from specedit.cost.modulation import modulation_width
from specedit.cost.tables import MODELS
from specedit.models.flux import FluxKontext
from specedit.models.flux2 import Flux2Dev
from specedit.models.qwen.edit import QwenImageEdit
from specedit.models.qwen21 import QwenImage21

TRANSFORMERS = {
    "flux-kontext": ("FluxTransformer2DModel", FluxKontext),
    "qwen-image-edit": ("QwenImageTransformer2DModel", QwenImageEdit),
    "qwen-image-2.1": ("QwenImage21Transformer2DModel", QwenImage21),
    "flux2-dev": ("Flux2Transformer2DModel", Flux2Dev),
}


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_weights_are_those_of_the_layers_that_are_hooked(model):
    name, adapter = TRANSFORMERS[model]
    if not hasattr(diffusers, name) or adapter is None:
        pytest.skip(f"this diffusers has no {name}")
    small = dict(MODELS[model].config) | dict(num_attention_heads=1, attention_head_dim=128, num_layers=2)
    small |= dict(num_single_layers=3) if "num_single_layers" in small else {}
    with torch.device("meta"):
        transformer = getattr(diffusers, name)(**small)
    vectors, width = modulation_width(small)
    weights = sum(layer.weight.numel() for layer, _ in adapter.modulation_layers.find(transformer))
    assert weights == vectors * width**2


def test_the_released_models_share():
    """3.25 of FLUX's 11.9 billion parameters, and 6.8 of Qwen-Image's 20.4."""
    for model, billions in (("flux-kontext", 3.25), ("qwen-image-edit", 6.81)):
        vectors, width = modulation_width(MODELS[model].config)
        assert vectors * width**2 / 1e9 == pytest.approx(billions, abs=0.005)


def test_turbo_reads_them_twice_instead_of_in_every_step():
    made = flops.plan("turbo", "flux-kontext", 1024, 1024, 0.2)["modulation"]
    assert made["reads"] == 9 + 4 and made["reads_once"] == 2
    assert made["bytes_less"] == 11 * made["weight_bytes"] == 11 * 2 * 344 * 3072**2
    assert made["kept_bytes"] == 2 * 13 * 345 * 3072


@pytest.mark.parametrize(
    ("model", "reads", "once"),
    [
        ("qwen-image-edit", 13, 2),  # guidance passes are packed
        ("longcat-image-edit", 26, 2),  # and here they are not, but have one modulation
        ("flux2-klein-9b-kv", 13, 6),  # the first steps of draft and stages have another timestep too
    ],
)
def test_forward_passes_that_read_them(model, reads, once):
    made = flops.plan("turbo", model, 1024, 1024, 0.2)["modulation"]
    assert (made["reads"], made["reads_once"]) == (reads, once)


def test_samples_with_different_masks_begin_their_mixed_stages_apart():
    cells = torch.zeros(2, 8, 8, dtype=torch.bool)
    cells[0, 0], cells[1, :3] = True, True
    made = flops.plan("turbo", "flux-kontext", 256, 256, cells=cells)["modulation"]
    assert made["reads_once"] == 3


def test_a_roofline_of_modulation_once_reads_as_much_less_as_the_plan_says():
    step, once = (
        roofline.predict_roofline(
            flops.resolve("turbo", modulation=modulation), "flux-kontext", 1024, 1024, 0.2, "H100"
        )
        for modulation in ("step", "once")
    )
    less = sum(stage["bytes"] for stage in step["stages"]) - sum(stage["bytes"] for stage in once["stages"])
    assert less == pytest.approx(once["modulation"]["bytes_less"], rel=0.02)  # steps leave the last norm's out
    assert once["seconds"] < step["seconds"] and [stage["name"] for stage in once["stages"]][1] == "modulation"
