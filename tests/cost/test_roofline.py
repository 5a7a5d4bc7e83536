"""The roofline, against worked cases and torch's own counts of the released autoencoders."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import real_models
from specedit.config import SpecEditConfig, presets, resolve
from specedit.cost import flops
from specedit.cost import roofline as planner
from specedit.cost.flops import MODELS, transformer_flops
from specedit.cost.roofline import (
    AUTOENCODERS,
    GPUS,
    Gpu,
    Op,
    measured_row,
    predict_roofline,
    roofline,
    transformer_ops,
)
from tests.cost.counted import assert_counted

D = 3072


def test_roofline_of_operators_by_hand():
    gpu = Gpu(flops=100.0, bandwidth=10.0, source="")
    # 50 operations are half a second; 20 bytes are two seconds; the larger bound counts, operator by operator.
    assert roofline([Op("a", 50, 1), Op("b", 50, 20), Op("c", 0, 5, count=4)], gpu) == 0.5 + 2.0 + 4 * 0.5
    assert roofline([], gpu) == 0


@given(st.sampled_from(sorted(MODELS)), st.integers(1, 12000), st.integers(1, 4))
def test_operations_are_those_of_the_cost_model(model, image, batch):
    tokens = MODELS[model].text_tokens + image
    counted = sum(op.count * op.flops for op in transformer_ops(model, tokens, batch))
    assert counted == pytest.approx(batch * transformer_flops(MODELS[model].config, tokens), rel=1e-12)
    read = image // 2
    counted = sum(op.count * op.flops for op in transformer_ops(model, tokens, batch, read=read))
    assert counted == pytest.approx(batch * transformer_flops(MODELS[model].config, tokens, None, read), rel=1e-12)
    counted = sum(op.count * op.flops for op in transformer_ops(model, image, batch, text=0, keys=tokens, read=read))
    assert counted == pytest.approx(batch * transformer_flops(MODELS[model].config, image, tokens, read), rel=1e-12)


@pytest.mark.parametrize(("model", "billions"), [("flux-kontext", 11.9), ("qwen-image-edit", 20.43)])
def test_weights_are_read_once(model, billions):
    # With next to no tokens, what is left are the weights: all but embeddings and output (below 1 %).
    read, twice = (sum(op.count * op.bytes for op in transformer_ops(model, 2 * n, text=n)) for n in (1, 2))
    rows = twice - read  # bytes are linear in tokens
    assert (read - rows) / 2 == pytest.approx(billions * 1e9, rel=0.01)


def test_one_single_block_by_hand():
    ops = [op for op in transformer_ops("flux-kontext", 1000) if op.count == 38]
    by_name = {op.name: op for op in ops}
    assert by_name["qkv"].flops == 2 * 1000 * D * 3 * D
    assert by_name["qkv"].bytes == 2 * (1000 * D + 1000 * 3 * D + 3 * D * D)
    assert by_name["projection and mlp down"].flops == 2 * 1000 * 5 * D * D
    assert by_name["gelu"].bytes == 2 * 2 * 1000 * 4 * D and by_name["gelu"].flops == 0
    (attention,) = [op for op in transformer_ops("flux-kontext", 1000) if op.name == "attention"]
    assert (attention.count, attention.flops) == (57, 4 * 1000 * 1000 * D)


def test_qwen_has_no_single_blocks():
    assert "cat" not in {op.name for op in transformer_ops("qwen-image-edit", 5000)}


def test_a_stock_step_on_an_h100_by_hand():
    # At 8,704 tokens every product is bound by the peak: 165.4 T / 989 T/s, and pointwise work comes on top.
    ops = transformer_ops("flux-kontext", 8704)
    products = [op for op in ops if op.flops]
    assert roofline(products, GPUS["H100"]) == pytest.approx(165.4e12 / 989e12, rel=0.03)
    pointwise = sum(op.count * op.bytes for op in ops if not op.flops) / 3.35e12
    assert roofline(ops, GPUS["H100"]) == pytest.approx(roofline(products, GPUS["H100"]) + pointwise)


def test_longcat_has_the_autoencoder_of_flux():
    assert AUTOENCODERS["longcat-image-edit"] == AUTOENCODERS["flux-kontext"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["flux-kontext", "qwen-image-edit"])
@pytest.mark.parametrize("half", ["encode", "features", "decode"])
def test_autoencoders_against_counted_layers(model, half):
    vae = real_models.MODELS[model]("meta", torch.bfloat16).vae
    side, frames = 64, (1,) if model == "qwen-image-edit" else ()
    assert_counted(model, half, vae, ((1, 3, *frames, 8 * side, 8 * side), (1, 16, *frames, side, side)), side**2)


def test_stages_of_a_plan_add_up():
    done = predict_roofline("turbo", "flux-kontext", 1024, 1024, 0.2, "H200")
    assert [s["name"] for s in done["stages"]] == ["encode", "draft", "verify", "coarse", "mixed", "full", "decode"]
    assert done["seconds"] == pytest.approx(sum(s["seconds"] for s in done["stages"]))
    assert done["quotient"] == pytest.approx(done["clock_ratio_50"] / done["flops_ratio_50"])
    assert done["clock_ratio_50"] == pytest.approx(done["seconds_stock"] / done["seconds"])
    assert done["stock_steps"] == 28 and done["flops_ratio"] == pytest.approx(0.56 * done["flops_ratio_50"])
    assert (
        0.56 * done["clock_ratio_50"] < done["clock_ratio"] < 0.57 * done["clock_ratio_50"]
    )  # encode, decode are whole
    draft = done["stages"][1]
    ops = transformer_ops("flux-kontext", 1024, read=256)
    assert draft["seconds"] == pytest.approx(4 * roofline(ops, GPUS["H200"]))
    assert draft["flops"] == pytest.approx(4 * transformer_flops(MODELS["flux-kontext"].config, 1024, None, 256))
    assert all(s["seconds"] >= max(s["flops"] / 989e12, s["bytes"] / 4.8e12) * (1 - 1e-9) for s in done["stages"])


def test_qwen_pays_for_both_guidance_passes():
    done = predict_roofline("turbo", "qwen-image-edit", 1024, 1024, 0.2, "H200")
    tokens = 1400 + 2 * 4096
    full = next(s for s in done["stages"] if s["name"] == "full")
    ops = transformer_ops("qwen-image-edit", tokens, read=4096)
    assert full["seconds"] == pytest.approx(10 * roofline(ops, GPUS["H200"]))
    stock = planner.step_seconds("qwen-image-edit", tokens, "H200")
    assert 0.98 * stock < full["seconds"] / 5 < stock


@pytest.mark.parametrize("model", sorted(MODELS))
def test_stages_of_a_plan_have_the_cost_models_operations(model):
    changes = dict(restore="reference", draft_condition="small", reference_refresh=2, guidance_range=(0.3, 0.9))
    for config in ("turbo", resolve("turbo", **changes), resolve("balanced", forecast="toca", forecast_interval=2)):
        rows = {row["name"]: row for row in flops.plan(config, model, 768, 1024, 0.1)["stages"]}
        for stage in predict_roofline(config, model, 768, 1024, 0.1, "H100")["stages"]:
            if stage["name"] in rows:
                assert stage["flops"] == pytest.approx(rows[stage["name"]]["flops"])
                assert stage["bytes"] > 0


def test_a_step_over_the_target_alone_reads_no_weights_of_the_text():
    d, few = 3072, MODELS["qwen-image-edit"].text_tokens + 64
    whole = sum(op.count * op.bytes for op in transformer_ops("qwen-image-edit", few))
    alone = sum(op.count * op.bytes for op in transformer_ops("qwen-image-edit", 64, text=0, keys=few))
    assert whole - alone > 60 * 2 * 18 * d * d  # 6 of modulation, 4 of attention, 8 of the MLP


def test_verification_costs_what_it_decodes():
    def verify(**change):
        config = resolve("turbo", **change)
        stages = predict_roofline(config, "flux-kontext", 1024, 1024, 0.2, "H100")["stages"]
        return next(s["flops"] for s in stages if s["name"] == "verify")

    pixels = 128 * 128
    assert verify(verify_at="full") == 2 * (pixels * 68_304_896 + 4 * 512 * pixels**2)
    small = pixels / 16
    assert verify(verify_at="draft") == 2 * (small * 68_304_896 + 4 * 512 * small**2)
    assert verify(selector="variance") == 0
    assert verify(selector="edges") == pixels * 605_618_176 + 4 * 512 * pixels**2


def test_verifying_the_coarse_stage_costs_what_verifying_the_draft_does():
    config = resolve("turbo", restore="reference")
    stages = predict_roofline(config, "flux-kontext", 1024, 1024, 0.2, "H100")["stages"]
    names = ["encode", "draft", "verify", "coarse", "second look", "mixed", "decode"]
    assert [s["name"] for s in stages] == names
    assert stages[2] | {"name": "second look"} == stages[4]
    once = predict_roofline(resolve(config, verify_coarse=False), "flux-kontext", 1024, 1024, 0.2, "H100")["stages"]
    assert [s["name"] for s in once] == [name for name in names if name != "second look"]


def test_without_a_draft_the_coarse_stage_costs_the_verification():
    run = predict_roofline(resolve("turbo", restore="reference"), "flux-kontext", 1024, 1024, 0.1, "H100")
    alone = predict_roofline(
        resolve("turbo", restore="reference", draft_steps=0), "flux-kontext", 1024, 1024, 0.1, "H100"
    )
    assert [s["name"] for s in alone["stages"]] == ["encode", "coarse", "verify", "mixed", "decode"]
    assert alone["stages"][2] == run["stages"][2] and alone["seconds"] < run["seconds"]


def test_pixel_restore_decodes_a_quarter_and_encodes_all():
    config = resolve("turbo", restore="pixels")
    stages = {s["name"]: s for s in predict_roofline(config, "flux-kontext", 1024, 1024, 0.1, "H100")["stages"]}
    assert list(stages)[-4:] == ["mixed", "pixels", "full", "decode"]
    assert stages["full"]["steps"] == 1 and stages["mixed"]["steps"] == sum(config.steps[1:]) - 1
    decode, encode = stages["decode"]["flops"], stages["encode"]["flops"]
    assert encode < stages["pixels"]["flops"] < encode + decode / 4
    whole = predict_roofline(config, "flux-kontext", 1024, 1024, 1.0, "H100")["stages"]
    assert "pixels" not in [s["name"] for s in whole]  # nothing is locked


@pytest.mark.parametrize("changes", [dict(restore="pixels"), dict(restore="reference", selector="edges")])
def test_a_presets_name_does_not_depend_on_its_restore(changes):
    assert planner.preset_of(resolve("turbo", **changes)) == ("turbo" if "selector" not in changes else "custom")
    assert planner.preset_of(resolve("turbo", restore="pixels", pixel_restore_sigma=0.2)) == "custom"


def test_without_a_draft_nothing_is_verified():
    config = SpecEditConfig(steps=(0, 0, 50), attention="stock")
    done = predict_roofline(config, "flux-kontext", 512, 512, 0.2, "A100")
    assert [s["name"] for s in done["stages"]] == ["encode", "full", "decode"]
    assert done["clock_ratio_50"] == pytest.approx(1) and done["flops_ratio_50"] == 1


@pytest.mark.parametrize("size", [(1024, 1024), (720, 1440), (768, 768), (16, 16), (48, 80)])
@pytest.mark.parametrize("gpu", GPUS)
def test_faster_gpus_and_smaller_edits_take_less(gpu, size):
    shares = [predict_roofline("turbo", "flux-kontext", *size, f, gpu)["seconds"] for f in (0.05, 0.2, 0.4, 1.0)]
    assert shares == sorted(shares) and shares[0] > 0
    assert predict_roofline("turbo", "flux-kontext", *size, 0.2, "A100")["seconds"] >= shares[1]


def test_few_tokens_cannot_use_the_peak():
    shares = [planner.share_of_peak("flux-kontext", n, "H100") for n in (514, 1024, 2560, 8704)]
    assert shares == sorted(shares) and 0 < shares[0] < 0.7 < shares[-1] < 1


def test_a_measured_run_is_found_by_everything_that_matters():
    config = dataclasses.replace(presets["turbo"], restore="reference")
    row = dict(
        model="flux-kontext", preset="turbo", restore="reference", height=1024, width=1024, batch=1,
        edit_fraction=0.2002, seconds=2.0,
    )  # fmt: skip
    slower = row | dict(seconds=3.0)
    file = dict(machine=dict(gpu="NVIDIA H100 80GB HBM3"), rows=[slower, row])

    def find(content=file, config=config, gpu="H100", size=(1024, 1024), share=0.2):
        return measured_row([content], config, "flux-kontext", *size, share, gpu)

    assert find() == row
    assert find(gpu="H200") is None and find(size=(768, 768)) is None and find(share=0.1) is None
    assert find(config=presets["turbo"]) is None and find(config=resolve("fast", restore="reference")) is None
    assert find(dict(machine=dict(gpu=None), rows=[row])) is None
    assert find(dict(file, rows=[row | dict(batch=4)])) is None
    assert measured_row([], config, "flux-kontext", 1024, 1024, 0.2, "H100") is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("turbo", "flux-kontext", 512, 512, 0.2, "RTX"), "gpu: expected one of A100"),
        (("turbo", "flux", 512, 512, 0.2, "H100"), "model: expected one of"),
        (("turbo", "flux-kontext", 512, 512, 2, "H100"), "edit_fraction: expected"),
    ],
)
def test_wrong_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        predict_roofline(*arguments)
