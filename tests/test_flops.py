import dataclasses
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from specedit.config import SpecEditConfig, presets
from specedit.flops import MODELS, plan, transformer_flops

FLUX = MODELS["flux-kontext"].config
# Table 5 of the paper: FLOPs ratios of SpecEdit on FLUX.1-Kontext-dev by NFE
PAPER_RATIOS = {"quality": 3.31, "balanced": 5.38, "fast": 6.92, "turbo": 7.37}


def test_flux_at_8704_tokens_is_the_papers_figure():
    flops = transformer_flops(FLUX, 8704)
    assert flops == pytest.approx(166.0e12, rel=0.01)
    assert flops == pytest.approx(165.4e12, rel=1e-3)


def test_mapping_and_object_configs_agree():
    assert transformer_flops(SimpleNamespace(**FLUX), 1000) == transformer_flops(FLUX, 1000)


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
    assert predicted["flops_ratio"] >= 0.93 * PAPER_RATIOS[preset]
    assert predicted["flops_ratio"] <= 1.05 * PAPER_RATIOS[preset]  # nor does the model flatter the method
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
        ("draft", 8),
        ("coarse", 7),
        ("mixed", 6),
        ("full", 5),
    ]
    tokens = {stage["name"]: stage["tokens"] for stage in predicted["stages"]}
    # Uniform coverage: 11 x 11 of the 32 x 32 cells become four tokens each.
    assert tokens == {"draft": 1024, "coarse": 2560, "mixed": 512 + 2 * (1024 + 3 * 121), "full": 8704}
    assert predicted["flops"] == sum(stage["flops"] for stage in predicted["stages"])
    assert predicted["flops_ratio"] == predicted["flops_stock"] / predicted["flops"]


def test_reference_restore_never_runs_full():
    config = dataclasses.replace(presets["turbo"], restore="reference")
    predicted = plan(config, "flux-kontext", 1024, 1024, 0.15)
    assert [(s["name"], s["steps"]) for s in predicted["stages"]] == [("draft", 8), ("coarse", 2), ("mixed", 7)]
    assert predicted["flops_ratio"] > 1.5 * plan("turbo", "flux-kontext", 1024, 1024, 0.15)["flops_ratio"]


def test_everything_edited_makes_the_mixed_stage_full():
    stages = {s["name"]: s["tokens"] for s in plan("balanced", "flux-kontext", 1024, 768, 1.0)["stages"]}
    assert stages["mixed"] == stages["full"] == 512 + 2 * 64 * 48


def test_stock_steps_without_a_draft_have_ratio_one():
    assert plan(SpecEditConfig(steps=(0, 0, 50)), "flux-kontext", 1024, 1024, 0.2)["flops_ratio"] == 1.0


def test_qwen_counts_both_guidance_passes():
    predicted = plan("balanced", "qwen-image-edit", 1024, 1024, 0.2)
    one_pass = transformer_flops(MODELS["qwen-image-edit"].config, 8192 + 1400)
    assert predicted["flops_stock"] == 100 * one_pass
    assert 4.5 < predicted["flops_ratio"] < 5.5  # Table 1 has 5.40 at NFE 18


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
    assert cost.step(8192) == 2 * transformer_flops(cost.config, 9592)
    assert cost.step(8192) / 1e12 == pytest.approx(396.4, abs=0.1)  # about 200 T a half


def test_no_uniform_coverage():
    config = SpecEditConfig(uniform_stride=None)
    stages = {s["name"]: s["tokens"] for s in plan(config, "flux-kontext", 512, 512, 0.0)["stages"]}
    assert stages["mixed"] == stages["coarse"]


@given(st.integers(16, 1600), st.integers(16, 1600), st.floats(0, 1), st.floats(0, 1), st.sampled_from(sorted(presets)))
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


def test_plan_counts_cached_steps():
    config = SpecEditConfig(steps=(0, 0, 50), forecast="taylor", forecast_interval=4)
    predicted = plan(config, "flux-kontext", 1024, 1024, 0.2)
    (stage,) = predicted["stages"]
    full = transformer_flops(FLUX, 8704)
    assert predicted["nfe"] == 50 and stage["cached"] == 36  # 3 full, then 1 of 4: 14 full
    assert stage["flops"] == 14 * full + 36 * 2 * 3 * 4096 * 64
    assert 3.56 < predicted["flops_ratio"] < 50 / 14


@pytest.mark.parametrize(("forecast", "recomputed"), [("toca", 36), ("duca", 12)])
def test_plan_of_token_wise_caches(forecast, recomputed):
    config = SpecEditConfig(steps=(0, 0, 50), forecast=forecast, forecast_interval=4)
    (stage,) = plan(config, "flux-kontext", 1024, 1024, 0.2)["stages"]
    part = transformer_flops(FLUX, 512 + 410, 8704)
    assert stage["flops"] == 14 * transformer_flops(FLUX, 8704) + recomputed * part


def test_plan_resets_at_stage_boundaries():
    plain = SpecEditConfig(steps=(7, 6, 5))
    cached = SpecEditConfig(steps=(7, 6, 5), forecast="taylor", forecast_order=1, forecast_interval=3)
    stages = plan(cached, "qwen-image-edit", 1024, 1024, 0.2)["stages"]
    assert [(s["name"], s["cached"]) for s in stages] == [("draft", 0), ("coarse", 3), ("mixed", 3), ("full", 2)]
    assert [s["tokens"] for s in stages] == [
        s["tokens"] for s in plan(plain, "qwen-image-edit", 1024, 1024, 0.2)["stages"]
    ]
