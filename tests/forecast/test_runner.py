"""Temporal caches inside the sampler: against loops written out, and that nothing stale reaches anything."""

from collections import Counter

import numpy as np
import pytest
import torch

import specedit
from specedit import SpecEditConfig
from specedit.api.installing import is_active
from specedit.cost.flops import transformer_flops
from specedit.forecast import ForecastRunner, lesa
from specedit.forecast.taylor import TaylorForecaster
from specedit.forecast.toca import KVCache, PartialForward, ToCa
from specedit.layout import MixedLayout, TokenGrid
from specedit.models.flux import FluxKontext
from specedit.registry import forecasts

CORNER = np.zeros((128, 128), dtype=bool)
CORNER[:60, :60] = True
CENTRE = np.zeros((128, 128), dtype=bool)
CENTRE[40:90, 40:120] = True
METHODS = list(forecasts)
TOKEN_WISE = [name for name in METHODS if forecasts[name].token_wise]
WHOLE = [name for name in METHODS if name not in TOKEN_WISE]
ALONE = dict(steps=(0, 0, 9), forecast_interval=3)
ORDER = {"taylor": {"forecast_order": 1}}
STAGES = dict(steps=(5, 5, 5), forecast_interval=2, boundaries=(0.7, 0.55))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def calls_of(pipe):
    calls = Counter()
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.update([kwargs["hidden_states"].shape[1]]), with_kwargs=True
    )
    return calls


@pytest.fixture
def weights(pipe, tmp_path):
    path = tmp_path / "lesa.safetensors"
    lesa.save(lesa.Predictor(), path, pipe.transformer.config)
    return {"lesa": {"forecast_weights": path}}


def written_out(pipe, edit, steps, forecaster):
    """The stock loop with a forecaster around the transformer's whole output."""
    specedit.install(pipe, steps=(0, 0, steps))
    plain = FluxKontext.velocity
    seen = []

    def velocity(self, run, group, sigma):
        i = len(seen)
        seen.append(forecaster.refresh(i))
        if not seen[-1]:
            return forecaster.predict(i, sigma)
        out = plain(self, run, group, sigma)
        forecaster.observe(i, out, sigma)
        return out

    FluxKontext.velocity = velocity
    try:
        return edit(pipe), seen
    finally:
        FluxKontext.velocity = plain


@pytest.mark.parametrize("order", [1, 2])
def test_alone_it_is_the_stock_loop_with_forecasts(pipe, edit, order):
    expected, full = written_out(pipe, edit, 9, TaylorForecaster(3, order=order, warmup=3))
    specedit.install(pipe, **ALONE, forecast="taylor", forecast_order=order)
    calls = calls_of(pipe)
    close(edit(pipe), expected)
    assert full == [True, True, True, False, False, True, False, False, True]
    assert calls == {128: 5}
    report = specedit.report(pipe)
    assert report.nfe == 9 and report.cached_steps == 4
    assert "NFE 9 (4 cached)" in str(report) and report.to_dict()["cached_steps"] == 4


@pytest.fixture(scope="module")
def plain(make_pipe, edit):
    """(latents, report) of a run of every stage without a forecast."""
    pipe = specedit.install(make_pipe(), steps=(5, 5, 5), boundaries=(0.7, 0.55))
    return edit(pipe, edit_mask=CORNER), specedit.report(pipe)


@pytest.mark.parametrize("forecast", METHODS)
def test_every_method_runs_in_every_stage(pipe, edit, forecast, weights, plain):
    specedit.install(pipe, **STAGES, forecast=forecast, draft_steps=2, **weights.get(forecast, {}))
    image = edit(pipe, edit_mask=CORNER)
    assert image.isfinite().all()
    report = specedit.report(pipe)
    cached = {stage.name: stage.cached for stage in report.stages if stage.steps}
    assert cached["coarse"] >= 1 and cached["full"] >= 1 and report.cache_bytes > 0
    assert 0 < (image - plain[0]).abs().max() < 5 and plain[1].flops > report.flops
    assert plain[1].cache_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("forecast", ["taylor", "freqca", "duca"])
def test_a_batch_of_two_masks_is_two_single_runs(pipe, edit, picture, forecast):
    specedit.install(pipe, **STAGES, forecast=forecast)
    pictures, prompts, masks = [picture(seed=1), picture(seed=2)], ["make it red", "add a boat"], [CORNER, CENTRE]
    noise = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = edit(pipe, image=pictures, prompt=prompts, edit_mask=masks, generator=noise)
    for i in range(2):
        generator = torch.Generator().manual_seed(3 + i)
        close(both[i], edit(pipe, image=pictures[i], prompt=prompts[i], edit_mask=masks[i], generator=generator)[0])


@pytest.mark.parametrize("forecast", ["foca", "toca"])
def test_a_batch_of_one_mask_is_two_single_runs(pipe, edit, picture, forecast):
    specedit.install(pipe, **STAGES, forecast=forecast)
    pictures = [picture(seed=1), picture(seed=2)]
    noise = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = edit(pipe, image=pictures, prompt=["make it red"] * 2, edit_mask=CORNER, generator=noise)
    for i in range(2):
        generator = torch.Generator().manual_seed(3 + i)
        close(both[i], edit(pipe, image=pictures[i], edit_mask=CORNER, generator=generator)[0])


def test_guidance_halves_have_histories_of_their_own(pipe, edit, monkeypatch):
    seen = []
    plain = TaylorForecaster.observe

    def observe(self, step, feature, sigma=None):
        seen.append((id(self), step))
        return plain(self, step, feature, sigma)

    monkeypatch.setattr(TaylorForecaster, "observe", observe)
    specedit.install(pipe, **ALONE, forecast="taylor")
    calls = calls_of(pipe)
    guided = dict(negative_prompt="dull", true_cfg_scale=3.0)
    image = edit(pipe, **guided)
    assert calls == {128: 10} and len({who for who, _ in seen}) == 2
    assert [step for who, step in seen if who == seen[0][0]] == [0, 1, 2, 5, 8]
    assert (image - edit(pipe)).abs().max() > 1e-3
    flops, memory = specedit.report(pipe).flops, specedit.report(pipe).cache_bytes
    edit(pipe, **guided)
    assert specedit.report(pipe).flops == 2 * flops and specedit.report(pipe).cache_bytes == 2 * memory


@pytest.mark.parametrize("forecast", TOKEN_WISE)
def test_token_wise_steps_under_guidance(pipe, edit, forecast):
    specedit.install(pipe, **ALONE, forecast=forecast)
    calls = calls_of(pipe)
    edit(pipe, negative_prompt="dull", true_cfg_scale=3.0)
    assert calls == {128: 10, 7: 8 if forecast == "toca" else 4}  # a tenth of 64 tokens


def test_recomputing_every_token_is_a_full_step(pipe, edit):
    """With all target tokens chosen, only the reference's keys and values are old."""
    specedit.install(pipe, steps=(0, 0, 4), forecast=ToCa(interval=4, fresh_ratio=1.0))
    everything = edit(pipe)
    specedit.install(pipe, steps=(0, 0, 4))
    stock = edit(pipe)
    specedit.install(pipe, steps=(0, 0, 4), forecast="toca", forecast_interval=4)
    tenth = edit(pipe)
    assert (everything - stock).abs().max() < (tenth - stock).abs().max()


@pytest.mark.parametrize("kind", ["fine", "mixed"])
def test_kept_keys_at_the_same_noise_change_nothing(pipe, edit, kind):
    """Some tokens against keys and values of this very step: exactly their rows of the full output, per sample."""
    specedit.install(pipe, steps=(0, 1, 1))
    results = []
    plain = FluxKontext.velocity

    def velocity(self, run, group, sigma):
        call, layout = (run, group, sigma), group.layout
        store = KVCache()
        (whole,) = self.predict(*call, [PartialForward(store)])
        index = torch.stack([torch.randperm(layout.tokens)[:5].sort().values for _ in group.rows])
        (some,) = self.predict(*call, [PartialForward(store, index)])
        results.append((layout.is_mixed, some, whole.gather(1, index[..., None].expand_as(some)), whole))
        assert torch.allclose(whole, plain(self, *call), atol=1e-5)
        return whole

    FluxKontext.velocity = velocity
    try:
        edit(pipe, edit_mask=CORNER, num_images_per_prompt=2)
    finally:
        FluxKontext.velocity = plain
    results = [r for r in results if r[0] == (kind == "mixed")]
    assert results
    for _, some, expected, _ in results:
        close(some, expected)


def test_flops_are_counted_step_by_step(pipe, edit):
    specedit.install(pipe, **ALONE, forecast="taylor")
    edit(pipe)
    full = transformer_flops(pipe.transformer.config, 144, read=64)
    stage = next(s for s in specedit.report(pipe).stages if s.name == "full")
    config = SpecEditConfig(**ALONE, forecast="taylor")
    assert stage.flops == 5 * full + 4 * config.forecast_options.operations(64 * 16) and stage.steps == 9
    specedit.install(pipe, **ALONE, forecast="toca")
    edit(pipe)
    stage = next(s for s in specedit.report(pipe).stages if s.name == "full")
    assert stage.flops == 5 * full + 4 * transformer_flops(pipe.transformer.config, 16 + 7, 144, 7)
    specedit.install(pipe, **ALONE, forecast="reuse")
    edit(pipe)
    stage = next(s for s in specedit.report(pipe).stages if s.name == "full")
    assert stage.flops == 5 * full


def test_memory_is_counted(pipe, edit):
    specedit.install(pipe, **ALONE, forecast="reuse")
    edit(pipe)
    assert specedit.report(pipe).cache_bytes == 64 * 16 * 4
    specedit.install(pipe, **ALONE, forecast="taylor", forecast_order=2)
    edit(pipe)
    assert specedit.report(pipe).cache_bytes == 3 * 64 * 16 * 4
    specedit.install(pipe, **ALONE, forecast="toca")
    edit(pipe)
    blocks, width = 2, 32
    assert specedit.report(pipe).cache_bytes == 4 * (64 * 16 + 2 * blocks * 144 * width)


# --------------------------------------------------------------------------------- interruption, errors, callbacks


@pytest.mark.parametrize("forecast", ["foca", "toca"])
def test_an_interrupted_run_leaves_nothing_behind(pipe, edit, forecast):
    specedit.install(pipe, **ALONE, forecast=forecast)
    expected = edit(pipe)

    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = index == 3  # between two full steps
        return {}

    edit(pipe, prompt="something else", seed=9, callback_on_step_end=stop)
    assert specedit.report(pipe).nfe == 4
    assert torch.equal(edit(pipe), expected)


@pytest.mark.parametrize("forecast", ["taylor", "toca"])
def test_an_exception_leaves_nothing_behind(pipe, edit, forecast):
    specedit.install(pipe, **ALONE, forecast=forecast)
    expected = edit(pipe)

    def fail(pipe, index, timestep, tensors):
        if index == 3:
            raise RuntimeError("stop here")
        return {}

    with pytest.raises(RuntimeError, match="stop here"):
        edit(pipe, prompt="something else", seed=9, callback_on_step_end=fail)
    assert torch.equal(edit(pipe), expected)
    specedit.uninstall(pipe)
    stock = edit(pipe, num_inference_steps=4)
    specedit.install(pipe, steps=(0, 0, 4))
    close(edit(pipe), stock)


def test_a_new_prompt_starts_a_new_history(pipe, edit):
    specedit.install(pipe, steps=(0, 0, 9), forecast="reuse", forecast_interval=6)
    other, _, _ = pipe.encode_prompt("add a boat", None, max_sequence_length=16)
    calls = calls_of(pipe)
    swap = lambda pipe, index, timestep, tensors: {"prompt_embeds": other} if index == 3 else {}  # noqa: E731
    edit(pipe, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert calls == {128: 6}  # 0, 1, 2, and again 4, 5, 6


# --------------------------------------------------------------------------------------------------- what is refused


def test_lesa_without_weights(pipe, edit):
    stock = type(pipe)
    with pytest.raises(FileNotFoundError, match=r"no trained predictor for this transformer.*training.lesa"):
        specedit.install(pipe, **ALONE, forecast="lesa")
    assert type(pipe) is stock
    specedit.install(pipe, steps=(0, 0, 3))
    with pytest.raises(FileNotFoundError, match="forecast_weights: expected a file, got '/nope'"):
        specedit.install(pipe, **ALONE, forecast="lesa", forecast_weights="/nope")
    edit(pipe)
    assert specedit.report(pipe).config.steps == (0, 0, 3)


def test_lesa_of_another_order_is_refused(pipe, weights):
    with pytest.raises(ValueError, match="forecast_order: expected 2, as the weights were trained, got 1"):
        specedit.install(pipe, "balanced", forecast="lesa", forecast_order=1, **weights["lesa"])


def test_untrained_lesa_is_taylorseer(pipe, edit, weights):
    specedit.install(pipe, **ALONE, forecast="lesa", **weights["lesa"])
    image = edit(pipe)
    specedit.install(pipe, **ALONE, forecast="taylor")
    close(edit(pipe), image)


def test_a_model_that_cannot_compute_single_tokens(pipe, monkeypatch):
    monkeypatch.setattr(FluxKontext, "token_wise", False)
    with pytest.raises(ValueError, match="'toca' computes single tokens again, which flux-kontext does not offer"):
        specedit.install(pipe, **ALONE, forecast="toca")
    assert not is_active(pipe)


def test_fewer_steps_than_the_history_needs_run_without_a_forecast(pipe, edit):
    specedit.install(pipe, **ALONE, forecast="taylor")
    with pytest.warns(UserWarning, match="num_inference_steps=3 leaves no stage long enough for forecast='taylor'"):
        edit(pipe, num_inference_steps=3)
    assert specedit.report(pipe).cached_steps == 0


@pytest.mark.parametrize("forecast", WHOLE)
def test_a_cached_step_costs_next_to_nothing(forecast):
    """At 1024 px: below a thousandth of a full step, in operations and in what it moves."""
    config = SpecEditConfig(steps=(0, 0, 50), forecast=forecast)
    full = transformer_flops(specedit.flops.MODELS["flux-kontext"].config, 8704)
    options = config.forecast_options
    assert options.operations(4096 * 64) < full / 1000
    layout = MixedLayout.all_fine(TokenGrid(4, 4))
    made = ForecastRunner(options, first=True, branches=2, layout=layout, shared=lesa.Predictor())
    assert len(made.branches) == 2 and made.memory == 0


@pytest.mark.parametrize("forecast", ["foca", "duca"])
def test_reference_restore_and_odd_sizes(pipe, edit, forecast):
    specedit.install(pipe, steps=(4, 3, 3), restore="reference", forecast=forecast, forecast_interval=2)
    mask = np.zeros((144, 176))
    mask[:40, :40] = 1
    latents = edit(pipe, (144, 176), edit_mask=mask)
    assert latents.shape == (1, 99, 16) and latents.isfinite().all()
    assert specedit.report(pipe).cached_steps > 0


def test_offloaded_module_by_module(pipe, edit):
    from accelerate import cpu_offload

    specedit.install(pipe, **ALONE, forecast="toca")
    expected = edit(pipe)
    cpu_offload(pipe.transformer, torch.device("cpu"))
    close(edit(pipe), expected)
