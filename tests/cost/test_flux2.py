"""FLUX.2's operations: its blocks have a gated MLP, and klein-KV computes its references once a stage."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import specedit
from specedit.config import SpecEditConfig, resolve
from specedit.cost.blocks import _COUNTS, BlockCount, block_count
from specedit.cost.flops import MODELS, plan, register_block_count, transformer_flops
from specedit.cost.roofline import autoencoder_ops

diffusers = pytest.importorskip("diffusers")
needs_flux2 = pytest.mark.skipif(not hasattr(diffusers, "Flux2Pipeline"), reason="this diffusers has no FLUX.2")
needs_kv = pytest.mark.skipif(not hasattr(diffusers, "Flux2KleinKVPipeline"), reason="this diffusers has no klein-KV")
SEQUENCE = 512 + 2 * 4096  # 1024 x 1024 and one reference


# S (L * 26 d^2 + L * 4 d S), by hand.
@pytest.mark.parametrize(
    ("model", "layers", "width", "tera"),
    [("flux2-dev", 56, 6144, 583), ("flux2-klein-9b", 32, 4096, 161), ("flux2-klein-4b", 25, 3072, 77)],
)
def test_a_step_by_hand(model, layers, width, tera):
    by_hand = SEQUENCE * (layers * 26 * width**2 + layers * 4 * width * SEQUENCE)
    assert MODELS[model].stock(2 * 4096) == by_hand == transformer_flops(MODELS[model].config, SEQUENCE)
    assert by_hand / 1e12 == pytest.approx(tera, abs=0.5)


@needs_flux2
def test_the_released_dev_is_the_default_of_its_class():
    from inspect import signature

    parameters = signature(diffusers.Flux2Transformer2DModel.__init__).parameters
    config = MODELS["flux2-dev"].config
    assert dict(config) == {name: parameters[name].default for name in config}


@needs_kv
def test_default_steps_are_those_of_the_pipelines():
    from inspect import signature

    for model, pipeline in (("flux2-dev", "Flux2Pipeline"), ("flux2-klein-9b-kv", "Flux2KleinKVPipeline")):
        default = signature(getattr(diffusers, pipeline).__call__).parameters["num_inference_steps"].default
        assert MODELS[model].default_steps == default


@pytest.fixture
def transformer():
    return diffusers.Flux2Transformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=64, num_attention_heads=8,
        joint_attention_dim=64, axes_dims_rope=(16, 16, 16, 16), guidance_embeds=False,
    )  # fmt: skip


def counted(model, text, image, **more):
    """Operations of a real transformer, counted by torch; the math backend, whose attention the counter knows."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = model(
            hidden_states=torch.zeros(1, image, 64), encoder_hidden_states=torch.zeros(1, text, 64),
            timestep=torch.zeros(1), img_ids=torch.zeros(image, 4), txt_ids=torch.zeros(text, 4), return_dict=False,
            **more,
        )  # fmt: skip
    return counter.get_total_flops(), result


@pytest.mark.slow
@needs_kv
def test_against_counted_operations(transformer):
    flops, _ = counted(transformer, 64, 704)
    predicted = transformer_flops(transformer.config, 64 + 704)
    assert 0.97 * flops < predicted <= flops  # embeddings, modulation and the output layer are left out


@pytest.mark.slow
@needs_kv
def test_kept_references_against_counted_operations(transformer):
    from diffusers.models.transformers import transformer_flux2 as stock

    for block in transformer.transformer_blocks:
        block.attn.set_processor(stock.Flux2KVAttnProcessor())
    for block in transformer.single_transformer_blocks:
        block.attn.set_processor(stock.Flux2KVParallelSelfAttnProcessor())
    text, target, reference = 64, 352, 352
    first, (_, cache) = counted(
        transformer, text, target + reference, kv_cache_mode="extract", num_ref_tokens=reference
    )
    later, _ = counted(transformer, text, target, kv_cache_mode="cached", kv_cache=cache)
    cost = specedit.flops.ModelCost(transformer.config, text, 1, fixed_reference=True)
    steps = [cost.stock(target + reference, n) for n in (1, 2)]
    assert 0.97 * first < steps[0] <= first
    assert 0.97 * later < steps[1] - steps[0] <= later


@pytest.mark.parametrize("restore", ["full", "reference"])
def test_kept_references_in_a_plan(restore):
    config = SpecEditConfig(steps=(2, 4, 2), restore=restore)
    own, kept = (plan(config, model, 1024, 1024, 0.2) for model in ("flux2-klein-9b", "flux2-klein-9b-kv"))
    assert own["flops"] > kept["flops"] and own["stock_steps"] == kept["stock_steps"] == 4
    for stage in kept["stages"]:
        target = (stage["tokens"] - 512) // 2
        calls = {(call.tokens, call.keys, call.read): call.count for call in stage["calls"]}
        assert calls == {
            (512 + target, 512 + 2 * target, target): stage["steps"], (target, None, 0): 1,
        }  # fmt: skip
    stock = MODELS["flux2-klein-9b-kv"].stock(8192, 4)
    assert kept["flops_ratio"] == stock / kept["flops"]
    assert stock < 4 * MODELS["flux2-klein-9b"].stock(8192)


@pytest.mark.parametrize("preset", ["ultra", "few-8", "few-4"])
def test_presets_leave_locked_cells_out_where_they_cannot_be_kept(preset):
    """As an installation does, whose processors keep references alone."""
    given, fitted = (
        plan(one, "flux2-klein-9b-kv", 1024, 1024, 0.2) for one in (preset, resolve(preset, locked="reference"))
    )
    assert given["flops"] == fitted["flops"] and all(stage["reused"] == 0 for stage in given["stages"])


def test_the_last_block_of_kept_references():
    ours, stock = (plan(SpecEditConfig(attention=a), "flux2-klein-9b-kv", 1024, 1024, 0.2) for a in ("auto", "stock"))
    d = 4096
    for a, b in zip(ours["stages"], stock["stages"], strict=True):
        target, steps = (b["tokens"] - 512) / 2, b["steps"]
        saved = steps * 512 * (8 * d**2 + 4 * d * b["tokens"]) + target * (8 * d**2 + 4 * d * target)
        assert b["flops"] - a["flops"] == pytest.approx(saved)


@needs_flux2
@pytest.mark.parametrize("half", ["encode", "features", "decode"])
def test_the_autoencoder_against_counted_layers(half):
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLFlux2()
    side, decoder = 64, vae.decoder

    def features(z):
        return decoder.up_blocks[0](decoder.mid_block(decoder.conv_in(z)))

    shape = (1, 3, 8 * side, 8 * side) if half == "encode" else (1, 32, side, side)
    run = dict(encode=vae.encode, features=features, decode=vae.decode)[half]
    with torch.no_grad(), torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(torch.zeros(shape))
    flops = sum(op.flops for op in autoencoder_ops("flux2-dev", half, side**2))
    assert flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_other_blocks_can_be_counted():
    try:
        register_block_count("my_field", lambda config: BlockCount(10.0, 2.0))
        config = dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, my_field=1)
        assert transformer_flops(config, 3) == 3 * 2 * (10 * 16**2 + 4 * 16 * 3)
        assert block_count({}) == BlockCount(24.0, 4.0)
    finally:
        _COUNTS.pop("my_field", None)
    with pytest.raises(
        TypeError, match="block count: expected a field's name and a function of the config, got 3, None"
    ):
        register_block_count(3, None)
