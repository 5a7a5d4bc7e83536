import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxSingleTransformerBlock
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from specedit.config import SpecEditConfig, presets
from specedit.cost.blocks import block_count
from specedit.cost.flops import MODELS, expanded_cells, plan, transformer_flops
from specedit.cost.forward import flops_of
from specedit.method.trace import ForwardCall
from specedit.models.attention import last_block
from specedit.models.attention import processors as attention
from specedit.models.attention.contexts import Stock
from specedit.models.attention.sequences import QueryRows

FLUX = MODELS["flux-kontext"].config
# Table 5 of the paper: FLOPs ratios of SpecEdit on FLUX.1-Kontext-dev by NFE
PAPER_RATIOS = {"quality": 3.31, "balanced": 5.38, "fast": 6.92, "turbo": 7.37}


def test_flux_at_8704_tokens_is_the_papers_figure():
    flops = transformer_flops(FLUX, 8704)
    assert flops == pytest.approx(166.0e12, rel=0.01)
    assert flops == pytest.approx(165.4e12, rel=1e-3)


def test_mapping_and_object_configs_agree():
    assert transformer_flops(SimpleNamespace(**FLUX), 1000) == transformer_flops(FLUX, 1000)


@pytest.mark.slow
def test_against_counted_operations():
    # A real transformer, counted by torch: the formula leaves out embeddings, modulation and the output layer, so at a
    # width where those are visible it lies just below the count.
    model = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=64, num_attention_heads=8,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    text, image = 64, 704
    # The math backend: torch's counter does not know the CPU's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(
            hidden_states=torch.zeros(1, image, 64), encoder_hidden_states=torch.zeros(1, text, 64),
            pooled_projections=torch.zeros(1, 64), timestep=torch.zeros(1), guidance=None,
            img_ids=torch.zeros(image, 3), txt_ids=torch.zeros(text, 3),
        )  # fmt: skip
    counted = counter.get_total_flops()
    predicted = transformer_flops(model.config, text + image)
    assert 0.97 * counted < predicted <= counted


@pytest.mark.slow
def test_a_trimmed_last_block_against_counted_operations():
    model = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=64, num_attention_heads=8,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    attention.attach(model, FluxAttention, attention.FluxMixedProcessor)
    last_block.attach(model.single_transformer_blocks[-1], FluxSingleTransformerBlock, last_block.FluxLastBlock)
    text, image, target = 32, 300, 150
    counted = []
    for read in (None, target):
        zeros = torch.zeros(text + image, 32), torch.zeros(text + image, 32)
        context = Stock(rotary=zeros, output_rows=QueryRows(torch.arange(read))) if read else None
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(
                hidden_states=torch.zeros(1, image, 64), encoder_hidden_states=torch.zeros(1, text, 64),
                pooled_projections=torch.zeros(1, 64), timestep=torch.zeros(1), guidance=None,
                img_ids=torch.zeros(image, 3), txt_ids=torch.zeros(text, 3),
                joint_attention_kwargs={"specedit": context},
            )  # fmt: skip
        counted.append(counter.get_total_flops())
    saved = transformer_flops(model.config, text + image) - transformer_flops(model.config, text + image, None, target)
    output = 2 * (image - target) * 512 * 64  # the output projection, which the formula leaves out
    assert counted[0] - counted[1] == saved + output


@pytest.mark.parametrize("missing", ["num_layers", "num_attention_heads", "attention_head_dim"])
def test_missing_field(missing):
    config = {name: value for name, value in FLUX.items() if name != missing}
    for wrong in (config, SimpleNamespace(**config)):
        with pytest.raises(ValueError, match=missing):
            transformer_flops(wrong, 10)


def test_wrong_tokens():
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="tokens: expected"):
            transformer_flops(FLUX, wrong)


@pytest.mark.parametrize("preset", PAPER_RATIOS)
def test_presets_reach_the_papers_ratios(preset):
    predicted = plan(preset, "flux-kontext", 1024, 1024, 0.2)
    assert predicted["flops_ratio_50"] >= 0.93 * PAPER_RATIOS[preset]
    assert predicted["flops_ratio_50"] <= 1.05 * PAPER_RATIOS[preset]  # nor does the model flatter the method
    assert predicted["flops_stock"] == pytest.approx(8299.54e12, rel=0.01)


def test_draft_step_is_the_papers_figure():
    # Table 11: four draft steps fewer save 53.42 T.
    draft = plan("balanced", "flux-kontext", 1024, 1024, 0.2)["stages"][0]
    assert draft["name"] == "draft" and draft["tokens"] == 256 + 256 + 512
    assert draft["flops"] / draft["steps"] == pytest.approx(53.42e12 / 4, rel=0.06)


def test_stages_of_a_full_restore():
    predicted = plan("balanced", "flux-kontext", 1024, 1024, 0.0)
    assert predicted["nfe"] == 18
    assert [(s["name"], s["steps"]) for s in predicted["stages"]] == [
        ("draft", 4),
        ("coarse", 7),
        ("mixed", 6),
        ("full", 5),
    ]
    tokens = {stage["name"]: stage["tokens"] for stage in predicted["stages"]}
    # Uniform coverage: 11 x 11 of the 32 x 32 cells become four tokens each.
    assert tokens == {"draft": 1024, "coarse": 2560, "mixed": 512 + 2 * (1024 + 3 * 121), "full": 8704}
    assert predicted["flops"] == sum(stage["flops"] for stage in predicted["stages"])
    assert predicted["flops_ratio_50"] == predicted["flops_stock"] / predicted["flops"]
    assert predicted["flops_ratio"] == pytest.approx(28 / 50 * predicted["flops_ratio_50"])


def test_reference_restore_never_runs_full():
    config = dataclasses.replace(presets["turbo"], restore="reference")
    predicted = plan(config, "flux-kontext", 1024, 1024, 0.15)
    assert [(s["name"], s["steps"]) for s in predicted["stages"]] == [("draft", 4), ("coarse", 2), ("mixed", 7)]
    assert predicted["flops_ratio"] > 1.5 * plan("turbo", "flux-kontext", 1024, 1024, 0.15)["flops_ratio"]


def test_everything_edited_makes_the_mixed_stage_full():
    stages = {s["name"]: s["tokens"] for s in plan("balanced", "flux-kontext", 1024, 768, 1.0)["stages"]}
    assert stages["mixed"] == stages["full"] == 512 + 2 * 64 * 48


@pytest.mark.parametrize(("share", "whole"), [(0.9, False), (0.91, True), (0.0, True), (0.01, False)])
def test_where_a_run_edits_everything(share, whole):
    """Nearly all edited, or nothing found where what is not found would be kept: the sampler's own two rules."""
    config = dataclasses.replace(presets["turbo"], restore="reference")
    assert (expanded_cells(config, 32, 32, share) == 32 * 32) == whole
    assert expanded_cells(presets["turbo"], 32, 32, 0.0) < 32 * 32


def test_stock_steps_without_a_draft_have_ratio_one():
    stock = SpecEditConfig(steps=(0, 0, 50), attention="stock")
    assert plan(stock, "flux-kontext", 1024, 1024, 0.2)["flops_ratio_50"] == 1.0
    # Otherwise the last of 57 blocks computes 4,096 of 8,704 tokens, and of the others keys and values.
    trimmed = plan(SpecEditConfig(steps=(0, 0, 50)), "flux-kontext", 1024, 1024, 0.2)
    assert 1.005 < trimmed["flops_ratio_50"] < 1.01


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("preset", [name for name in presets if presets[name].locked == "coarse"])
def test_the_last_block_saves_what_it_does_not_compute(model, preset):
    config = presets[preset]
    ours, stock = (
        plan(dataclasses.replace(config, attention=how), model, 1024, 1024, 0.2) for how in ("auto", "stock")
    )
    assert ours["flops_stock"] == stock["flops_stock"]
    cost = MODELS[model]
    layers = cost.config["num_layers"] + cost.config.get("num_single_layers", 0)
    d = cost.config["num_attention_heads"] * cost.config["attention_head_dim"]
    whole, unread, _ = block_count(cost.config)
    if cost.fixed_reference or cost.fixed_prefix:
        pytest.skip("its calls are others: tests/cost/test_flux2.py, tests/cost/test_qwen21.py")
    for a, b in zip(ours["stages"], stock["stages"], strict=True):
        n = (b["tokens"] - cost.text_tokens) / 2
        left = b["tokens"] - n
        saved = b["steps"] * cost.passes * left * ((whole - unread) * d * d + 4 * d * b["tokens"])
        assert b["flops"] - a["flops"] == pytest.approx(saved)
        assert saved < b["flops"] / layers


def test_qwen_counts_both_guidance_passes():
    predicted = plan("balanced", "qwen-image-edit", 1024, 1024, 0.2)
    one_pass = transformer_flops(MODELS["qwen-image-edit"].config, 8192 + 1400)
    assert predicted["flops_stock"] == 100 * one_pass
    assert predicted["flops_ratio"] == predicted["flops_ratio_50"]  # its own default is 50 steps
    assert 4.5 < predicted["flops_ratio_50"] < 5.5  # Table 1 has 5.40 at NFE 18


def test_a_small_condition_image_makes_the_draft_cheaper_and_nothing_else():
    full, small = (
        plan(SpecEditConfig(draft_condition=condition), "qwen-image-edit", 1024, 1024, 0.2)["stages"]
        for condition in ("full", "small")
    )
    assert full[0]["tokens"] == 1400 + 512 and small[0]["tokens"] == 60 + 84 + 512
    assert full[1:] == small[1:]
    for condition in ("full", "small"):  # FLUX's prompt holds no picture
        draft = plan(SpecEditConfig(draft_condition=condition), "flux-kontext", 1024, 1024, 0.2)["stages"][0]
        assert draft["tokens"] == 512 + 512


def test_another_model_by_its_cost():
    cost = MODELS["qwen-image-edit"]
    assert plan("turbo", cost, 512, 768, 0.3) == plan("turbo", "qwen-image-edit", 512, 768, 0.3)
    assert cost.stock(8192) == 2 * transformer_flops(cost.config, 9592)
    assert cost.stock(8192) / 1e12 == pytest.approx(396.4, abs=0.1)  # about 200 T a half


def test_no_uniform_coverage():
    config = SpecEditConfig(uniform_stride=None)
    stages = {s["name"]: s["tokens"] for s in plan(config, "flux-kontext", 512, 512, 0.0)["stages"]}
    assert stages["mixed"] == stages["coarse"]


# Where unedited cells are kept, a run that finds nothing edits everything.
FULL = sorted(name for name, config in presets.items() if config.restore == "full")


@pytest.mark.slow
@given(st.integers(16, 1600), st.integers(16, 1600), st.floats(0, 1), st.floats(0, 1), st.sampled_from(FULL))
def test_more_edited_never_costs_less(height, width, a, b, preset):
    low, high = (plan(preset, "flux-kontext", height, width, f) for f in sorted((a, b)))
    assert low["flops"] <= high["flops"]
    tokens = {stage["name"]: stage["tokens"] for stage in high["stages"]}
    assert tokens["draft"] <= tokens["coarse"] <= tokens["mixed"] <= tokens["full"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("turbo", "flux", 512, 512, 0.2), "model: expected one of flux-kontext"),
        (("turboo", "flux-kontext", 512, 512, 0.2), "did you mean 'turbo'"),
        (("turbo", "flux-kontext", 8, 512, 0.2), "height: expected"),
        (("turbo", "flux-kontext", 512, 0, 0.2), "width: expected"),
        (("turbo", "flux-kontext", 512, 512, 1.2), "edit_fraction: expected"),
        (("turbo", "flux-kontext", 512, 512, float("nan")), "edit_fraction: expected"),
    ],
)
def test_wrong_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        plan(*arguments)


# --------------------------------------------------------------------------------------------------- temporal caches


def test_keys_from_a_cache():
    d = 3072
    assert transformer_flops(FLUX, 100, 900) == 100 * 57 * (24 * d * d + 4 * d * 900)
    assert transformer_flops(FLUX, 100, 100) == transformer_flops(FLUX, 100)
    last = 100 * 4 * d * d + 40 * (20 * d * d + 4 * d * 900)
    assert transformer_flops(FLUX, 100, 900, 40) == 100 * 56 * (24 * d * d + 4 * d * 900) + last
    assert transformer_flops(FLUX, 100, 900, 100) == transformer_flops(FLUX, 100, 900)


def test_plan_counts_cached_steps():
    config = SpecEditConfig(steps=(0, 0, 50), forecast="taylor", forecast_interval=4)
    predicted = plan(config, "flux-kontext", 1024, 1024, 0.2)
    (stage,) = predicted["stages"]
    full = transformer_flops(FLUX, 8704, read=4096)
    assert predicted["nfe"] == 50 and stage["cached"] == 36  # 3 full, then 1 of 4: 14 full
    assert stage["flops"] == 14 * full + 36 * 2 * 3 * 4096 * 64
    assert 3.56 < predicted["flops_ratio_50"] < 1.01 * 50 / 14


@pytest.mark.parametrize(("forecast", "recomputed"), [("toca", 36), ("duca", 12)])
def test_plan_of_token_wise_caches(forecast, recomputed):
    config = SpecEditConfig(steps=(0, 0, 50), forecast=forecast, forecast_interval=4)
    (stage,) = plan(config, "flux-kontext", 1024, 1024, 0.2)["stages"]
    part = transformer_flops(FLUX, 512 + 410, 8704, 410)
    assert stage["flops"] == 14 * transformer_flops(FLUX, 8704, read=4096) + recomputed * part


def test_plan_resets_at_stage_boundaries():
    plain = SpecEditConfig(steps=(7, 6, 5))
    cached = SpecEditConfig(steps=(7, 6, 5), forecast="taylor", forecast_order=1, forecast_interval=3)
    stages = plan(cached, "qwen-image-edit", 1024, 1024, 0.2)["stages"]
    assert [(s["name"], s["cached"]) for s in stages] == [("draft", 0), ("coarse", 3), ("mixed", 3), ("full", 2)]
    assert [s["tokens"] for s in stages] == [
        s["tokens"] for s in plan(plain, "qwen-image-edit", 1024, 1024, 0.2)["stages"]
    ]


# ------------------------------------------------------------------------------------------ approximate, by a switch


def test_plan_of_a_kept_reference():
    config = SpecEditConfig(steps=(0, 4, 5), restore="reference", reference_refresh=3)
    draft, mixed = plan(config, "flux-kontext", 1024, 1024, 0.2)["stages"]
    assert (draft["steps"], draft["reused"]) == (4, 2) and (mixed["steps"], mixed["reused"]) == (9, 6)
    own = (mixed["tokens"] - 512) // 2
    whole = ForwardCall("mixed", 2 * own + 512, 512, None, own, count=3)
    part = ForwardCall("mixed", own, 0, 2 * own + 512, own, count=6)
    assert mixed["calls"] == [whole, part]
    flops = [transformer_flops(FLUX, c.tokens, c.keys, c.read) for c in (whole, part)]
    assert mixed["flops"] == 3 * flops[0] + 6 * flops[1]
    every = plan(dataclasses.replace(config, reference_refresh=1), "flux-kontext", 1024, 1024, 0.2)
    assert every == plan(dataclasses.replace(config, reference_refresh=None), "flux-kontext", 1024, 1024, 0.2)


def test_plan_with_reference_refresh_and_a_forecast():
    config = SpecEditConfig(steps=(0, 0, 12), forecast="reuse", forecast_interval=2, reference_refresh=4)
    (stage,) = plan(config, "flux-kontext", 1024, 1024, 0.2)["stages"]
    # Computed: 0, 1, 2, 4, 6, 8, 10; refreshed: 0, 4, 8.
    assert (stage["cached"], stage["reused"]) == (5, 4)


def test_plan_of_a_guidance_range():
    model = "qwen-image-edit"
    config = SpecEditConfig(steps=(0, 0, 50))
    (whole,) = plan(config, model, 1024, 1024, 0.2)["stages"]
    ranged = {
        bounds: plan(dataclasses.replace(config, guidance_range=bounds), model, 1024, 1024, 0.2)["stages"][0]
        for bounds in ((0.0, 1.0), (0.9, 1.0), (0.0, 0.9), (0.001, 0.002))
    }
    assert ranged[0.0, 1.0] == whole
    assert ranged[0.001, 0.002]["flops"] == whole["flops"] / 2  # no step lies there
    high, low = (ranged[bounds]["calls"][0].count - 50 for bounds in ((0.9, 1.0), (0.0, 0.9)))
    assert high + low == 50 and 5 < high < 15  # a shift of about 2 leaves few steps above 0.9
    flux = plan(dataclasses.replace(config, guidance_range=(0.9, 1.0)), "flux-kontext", 1024, 1024, 0.2)
    assert flux == plan(config, "flux-kontext", 1024, 1024, 0.2)  # distilled: there is one pass


def test_what_the_switches_promise_for_qwen():
    config = dataclasses.replace(presets["turbo"], restore="reference", draft_condition="small")
    exact = plan(config, "qwen-image-edit", 1024, 1024, 0.2)["flops_ratio"]
    kept = plan(dataclasses.replace(config, reference_refresh=4), "qwen-image-edit", 1024, 1024, 0.2)["flops_ratio"]
    both = dataclasses.replace(config, reference_refresh=4, guidance_range=(0.3, 1.0))
    assert exact < kept < plan(both, "qwen-image-edit", 1024, 1024, 0.2)["flops_ratio"]


# --------------------------------------------------------------------------------------------------- LongCat-Image-Edit


def test_longcat_has_the_released_transformer_and_default_steps():
    pytest.importorskip("diffusers.pipelines.longcat_image")
    from diffusers import LongCatImageEditPipeline, LongCatImageTransformer2DModel

    cost = MODELS["longcat-image-edit"]
    defaults = inspect.signature(LongCatImageTransformer2DModel.__init__).parameters
    assert dict(cost.config) == {name: defaults[name].default for name in cost.config}
    call = inspect.signature(LongCatImageEditPipeline.__call__).parameters
    assert cost.default_steps == call["num_inference_steps"].default
    assert cost.passes == 2 and call["guidance_scale"].default > 1


def test_plan_of_longcat():
    predicted = plan("balanced", "longcat-image-edit", 1024, 1024, 0.2)
    assert {row["name"]: row["tokens"] for row in predicted["stages"]}["full"] == 838 + 8192
    assert predicted["flops_stock"] == 100 * transformer_flops(FLUX, 838 + 8192)
    assert 4.5 < predicted["flops_ratio"] == predicted["flops_ratio_50"] < 6


# ------------------------------------------------------------------------------------------------ cells that were found


def test_cells_decide_the_mixed_stage():
    cells = torch.zeros(2, 32, 32, dtype=torch.bool)
    cells[0, :4, :5] = True
    row = plan("balanced", "flux-kontext", 1024, 1024, cells=cells)["stages"][2]
    assert [(call.tokens, call.samples, call.count) for call in row["calls"]] == [
        (512 + 2 * (1024 + 60), 1, 6), (512 + 2 * 1024, 1, 6),
    ]  # fmt: skip
    assert row["tokens"] == 512 + 2 * 1024 + 60
    one = plan("balanced", "flux-kontext", 1024, 1024, cells=cells[0])
    assert one["flops_stock"] == plan("balanced", "flux-kontext", 1024, 1024, 0.2)["flops_stock"]
    assert [row["name"] for row in one["stages"]] == ["draft", "coarse", "mixed", "full"]
    given = plan("balanced", "flux-kontext", 1024, 1024, cells=cells[0], drafts=False)
    assert given["stages"] == one["stages"][1:]


@pytest.mark.parametrize(
    ("cells", "error", "message"),
    [
        ([[True]], TypeError, "cells: expected a bool tensor, got list"),
        (torch.zeros(32, 32), ValueError, r"cells: expected bool \(32, 32\) or \(B, 32, 32\), got torch.float32"),
        (torch.zeros(32, 31, dtype=torch.bool), ValueError, r"got torch.bool \(32, 31\)"),
        (torch.zeros(0, 32, 32, dtype=torch.bool), ValueError, r"got torch.bool \(0, 32, 32\)"),
    ],
)
def test_wrong_cells(cells, error, message):
    with pytest.raises(error, match=message):
        plan("balanced", "flux-kontext", 1024, 1024, cells=cells)


def test_cells_and_a_share_exclude_each_other():
    cells = torch.ones(32, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"edit_fraction: expected None beside cells, got 0\.2"):
        plan("balanced", "flux-kontext", 1024, 1024, 0.2, cells=cells)
    with pytest.raises(ValueError, match="edit_fraction: expected a number from 0 to 1, got None"):
        plan("balanced", "flux-kontext", 1024, 1024)


@given(st.lists(st.tuples(st.integers(1, 900), st.floats(0, 50), st.integers(1, 3), st.integers(1, 9)), min_size=1))
def test_how_calls_are_grouped_does_not_matter(calls):
    listed = [ForwardCall("a", tokens + text, text, samples=n, count=m) for tokens, text, n, m in calls]
    apart = [ForwardCall("b", c.tokens, c.text) for c in listed for _ in range(c.samples * c.count)]
    assert flops_of(listed, FLUX) == flops_of(apart[::-1], FLUX)
