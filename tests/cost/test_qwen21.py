"""Qwen-Image-2.1's operations: text and references once a run, then the target's tokens alone."""

from inspect import signature

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from specedit.config import SpecEditConfig
from specedit.cost.flops import MODELS, plan
from specedit.cost.roofline import transformer_ops
from specedit.cost.tables import ModelCost
from tests.cost.counted import assert_counted

diffusers = pytest.importorskip("diffusers")
needs_qwen21 = pytest.mark.skipif(
    not hasattr(diffusers, "QwenImage21Pipeline"), reason="this diffusers has no Qwen-Image-2.1"
)
MODEL = "qwen-image-2.1"
LAYERS, WIDTH, WORDS, IMAGE = 32, 4096, 76, 4096  # 1024 x 1024 is 64 x 64 tokens


def test_a_step_by_hand():
    """Per token and block: four projections (8 d^2), and three matrices of ratio 3 (18 d^2).

    The pipeline puts the reference's 4,096 latents in the place of its 1,024 vision tokens. Were these among the keys
    besides, a step would take 77 T.
    """
    cost = MODELS[MODEL]
    steps = [cost.stock(2 * IMAGE, n) for n in (1, 2, 40)]

    def target(keys):
        return IMAGE * LAYERS * (26 * WIDTH**2 + 4 * WIDTH * keys)

    later = target(WORDS + 2 * IMAGE)
    assert steps[1] - steps[0] == later and later / 1e12 == pytest.approx(75, abs=0.5)
    assert target(WORDS + 1024 + 2 * IMAGE) / 1e12 == pytest.approx(77, abs=0.5)
    # The reference sees itself, and the words behind it see both.
    pairs = IMAGE**2 + WORDS * (IMAGE + WORDS)
    prefix = LAYERS * ((IMAGE + WORDS) * 26 * WIDTH**2 + 4 * WIDTH * pairs)
    assert steps[0] == pytest.approx(prefix + later, rel=1e-12)
    assert steps[2] == pytest.approx(prefix + 40 * later, rel=1e-12)


@needs_qwen21
def test_the_released_sizes_and_steps_are_the_defaults_of_the_classes():
    parameters = signature(diffusers.QwenImage21Transformer2DModel.__init__).parameters
    cost = MODELS[MODEL]
    assert dict(cost.config) == {name: parameters[name].default for name in cost.config}
    call = signature(diffusers.QwenImage21Pipeline.__call__).parameters
    assert cost.default_steps == call["num_inference_steps"].default and call["true_cfg_scale"].default == cost.passes


@pytest.mark.slow
@needs_qwen21
def test_against_counted_operations():
    """A real transformer, counted by torch; the math backend, whose attention the counter knows."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    model = diffusers.QwenImage21Transformer2DModel(
        in_channels=64, num_layers=3, attention_head_dim=64, num_attention_heads=8, context_in_dim=64,
        axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    words, slots, side = 40, 64, 16
    img_mask = torch.zeros(1, words + 2 * slots, dtype=torch.bool)
    img_mask[:, :slots] = img_mask[:, -slots:] = True
    cache, flops = QwenImage21KVCache(3), []
    for mode in ("extract", "cached"):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(
                hidden_states=torch.zeros(1, 2 * side**2, 64), encoder_hidden_states=torch.zeros(1, words + slots, 64),
                timestep=torch.zeros(1), img_shapes=[[(1, side, side)] * 2], img_mask=img_mask, kv_cache=cache,
                kv_cache_mode=mode, return_dict=False,
            )  # fmt: skip
        flops.append(counter.get_total_flops())
    cost = ModelCost(model.config, words, 1, fixed_prefix=True)
    steps = [cost.stock(2 * side**2, n) for n in (1, 2)]
    assert 0.95 * flops[0] < steps[0] <= flops[0]  # embeddings, modulation and the output layer are left out
    assert 0.95 * flops[1] < steps[1] - steps[0] <= flops[1]


@pytest.mark.parametrize("restore", ["full", "reference"])
def test_the_prefix_in_a_plan(restore):
    config = SpecEditConfig(steps=(2, 4, 2), draft_steps=3, restore=restore)
    planned = plan(config, MODEL, 1024, 1024, 0.2)
    assert planned["stock_steps"] == 40
    for i, stage in enumerate(planned["stages"]):
        target = stage["tokens"] - WORDS - IMAGE  # the reference is fine in every stage
        calls = {(call.tokens, call.keys): call.count for call in stage["calls"]}
        prefix = calls.pop((WORDS + IMAGE, (IMAGE**2 + WORDS * (IMAGE + WORDS)) / (WORDS + IMAGE)), 0)
        assert prefix == (i == 0)
        assert calls == {(target, stage["tokens"]): stage["steps"]}
    assert planned["flops_ratio"] == MODELS[MODEL].stock(2 * IMAGE, 40) / planned["flops"]


def test_without_a_draft_the_first_stage_computes_the_prefix():
    planned = plan(SpecEditConfig(steps=(0, 0, 40)), MODEL, 1024, 1024, 0.2)
    assert planned["flops_ratio"] == pytest.approx(1, rel=1e-12)


def test_operators_of_a_step():
    ops = {op.name: op for op in transformer_ops(MODEL, IMAGE, text=0, keys=2 * IMAGE)}
    assert ops["qkv"].count == LAYERS and ops["qkv"].flops == 6 * IMAGE * WIDTH**2
    assert ops["mlp up"].flops + ops["mlp down"].flops == 18 * IMAGE * WIDTH**2
    assert ops["modulation"].bytes == 2 * 4 * WIDTH**2 and ops["modulation"].count == 1


@needs_qwen21
@pytest.mark.slow
@pytest.mark.parametrize("half", ["encode", "features", "decode"])
def test_the_autoencoder_against_counted_layers(half):
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLQwenImage21()
    side = 64
    assert_counted(MODEL, half, vae, ((1, 4, 1, 16 * side, 16 * side), (1, 64, 1, side, side)), side**2)


@pytest.mark.parametrize("preset", ["ultra", "few-8", "few-4"])
def test_presets_keep_locked_cells(preset):
    """Steps between compute the fine tokens alone, beside the prefix and all of the target."""
    mixed = plan(preset, MODEL, 1024, 1024, 0.2)["stages"][-1]
    assert mixed["reused"] == mixed["steps"] - 1
    cells = IMAGE // 4
    fine = 4 * round(0.2 * cells)
    target = fine + cells - fine // 4
    keys = WORDS + IMAGE + target
    assert {(call.tokens, call.keys): call.count for call in mixed["calls"]} == {
        (target, keys): 1, (fine, keys): mixed["reused"],
    }  # fmt: skip
