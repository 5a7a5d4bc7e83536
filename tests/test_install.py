"""On and off a pipeline: what is swapped, what comes back, and what runs the stock path instead."""

import json
import threading
import types
import warnings
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxKontextPipeline,
    PyramidAttentionBroadcastConfig,
)
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm

import specedit
from specedit.install import _Listener, is_active

QUICK = dict(steps=(1, 1, 1), draft_steps=1)
CORNER = np.zeros((128, 128), dtype=bool)
CORNER[:60, :60] = True


def processors(pipe):
    return list(pipe.transformer.attn_processors.values())


def same_objects(first, second):
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


@pytest.fixture
def check_untouched(edit):
    """Remembers a pipeline; the function that it returns asserts that uninstall brings everything back."""

    def remember(pipe):
        cls, parts, image, attributes = type(pipe), processors(pipe), edit(pipe, num_inference_steps=2), set(vars(pipe))

        def check():
            assert specedit.uninstall(pipe) is pipe
            assert type(pipe) is cls and not is_active(pipe)
            assert same_objects(processors(pipe), parts)
            assert torch.equal(edit(pipe, num_inference_steps=2), image)
            assert set(vars(pipe)) == attributes

        return check

    return remember


# ------------------------------------------------------------------------------------------------------ on and off


def test_install_changes_one_instance(pipe, make_pipe, edit, check_untouched):
    check, other, before = check_untouched(pipe), make_pipe(), FluxKontextPipeline.__call__
    assert specedit.install(pipe, "turbo") is pipe and is_active(pipe)
    assert isinstance(pipe, FluxKontextPipeline) and type(pipe).__name__ == "FluxKontextPipeline"
    assert type(other) is FluxKontextPipeline and FluxKontextPipeline.__call__ is before
    assert not any(hasattr(p, "original") for p in processors(other)) and not is_active(other)
    stock = edit(other, num_inference_steps=3)
    accelerated = edit(pipe, num_inference_steps=3)
    assert not torch.equal(accelerated, stock)
    check()
    assert torch.equal(edit(pipe, num_inference_steps=3), stock)


def test_install_twice_replaces_the_configuration(pipe, edit, check_untouched):
    check = check_untouched(pipe)
    specedit.install(pipe, "turbo")
    edit(pipe)
    assert specedit.report(pipe).nfe == 9
    cls, wrapped = type(pipe), processors(pipe)
    specedit.install(pipe, "lightning-6", dilation=0)
    assert type(pipe) is cls and same_objects(processors(pipe), wrapped)
    with pytest.raises(ValueError, match="at least one accelerated call"):
        specedit.report(pipe)  # the last report was another configuration's
    edit(pipe)
    assert specedit.report(pipe).nfe == 6 and specedit.report(pipe).config.dilation == 0
    check()


def test_uninstall_is_harmless_twice_and_without_install(pipe, check_untouched):
    check = check_untouched(pipe)
    check()
    specedit.install(pipe)
    check()
    check()


def test_install_and_uninstall_many_times(pipe, edit, check_untouched):
    check = check_untouched(pipe)
    images = []
    for _ in range(3):
        specedit.install(pipe, **QUICK)
        images.append(edit(pipe))
        specedit.uninstall(pipe)
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    check()


def test_report_needs_an_accelerated_call(pipe, edit):
    with pytest.raises(ValueError, match="expected a pipeline with SpecEdit installed, got a plain FluxKontext"):
        specedit.report(pipe)
    specedit.install(pipe, **QUICK)
    with pytest.raises(ValueError, match="expected at least one accelerated call, got none since install"):
        specedit.report(pipe)
    with specedit.disabled(pipe):
        edit(pipe, num_inference_steps=1)
    with pytest.raises(ValueError, match="got none since install"):
        specedit.report(pipe)
    with pytest.raises(ValueError, match="got a plain NoneType"):
        specedit.report(None)


def test_disabled_runs_the_stock_call(pipe, edit):
    stock = edit(pipe, num_inference_steps=3)
    specedit.install(pipe, **QUICK)
    accelerated = edit(pipe)
    with specedit.disabled(pipe) as same:
        assert same is pipe and not is_active(pipe)
        assert torch.equal(edit(pipe, num_inference_steps=3), stock)
        with specedit.disabled(pipe):
            pass
        assert not is_active(pipe)
    assert is_active(pipe) and torch.equal(edit(pipe), accelerated)
    with pytest.raises(RuntimeError, match="mine"), specedit.disabled(pipe):
        raise RuntimeError("mine")
    assert is_active(pipe)
    specedit.uninstall(pipe)
    with specedit.disabled(pipe):  # nothing to disable
        assert torch.equal(edit(pipe, num_inference_steps=3), stock)


def test_disabled_blocks_in_many_threads_are_counted(pipe):
    specedit.install(pipe)

    def open_and_close():
        for _ in range(2000):
            with specedit.disabled(pipe):
                pass

    threads = [threading.Thread(target=open_and_close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert is_active(pipe)


def test_save_pretrained_while_installed(pipe, edit, tmp_path):
    stock = edit(pipe, num_inference_steps=2)
    specedit.install(pipe)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "FluxKontextPipeline"
    assert "specedit" not in (tmp_path / "model_index.json").read_text().lower()
    loaded = FluxKontextPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is FluxKontextPipeline
    torch.testing.assert_close(edit(loaded, num_inference_steps=2), stock, rtol=1e-5, atol=1e-5)


def test_a_pipeline_that_shares_the_transformer(pipe, edit):
    other = FluxKontextPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    stock = edit(other, num_inference_steps=2)
    for p in (pipe, other):
        specedit.install(p, **QUICK)
    expected = edit(other, edit_mask=CORNER)
    specedit.uninstall(pipe)
    assert torch.equal(edit(pipe, num_inference_steps=2), stock)
    assert torch.equal(edit(other, edit_mask=CORNER), expected)
    specedit.uninstall(other)
    assert torch.equal(edit(other, num_inference_steps=2), stock)


def test_a_subclass_is_its_own_again_after_uninstall(make_pipe, edit, check_untouched):
    class Mine(FluxKontextPipeline):
        pass

    pipe = make_pipe(Mine)
    check = check_untouched(pipe)
    specedit.install(pipe, **QUICK)
    assert isinstance(pipe, Mine) and type(pipe).__name__ == "Mine"
    edit(pipe)
    check()


def test_fused_projections_after_install(pipe, edit):
    specedit.install(pipe, **QUICK)
    expected = edit(pipe, edit_mask=CORNER)
    pipe.transformer.fuse_qkv_projections()
    torch.testing.assert_close(edit(pipe, edit_mask=CORNER), expected, rtol=1e-5, atol=1e-5)


def test_two_pipelines_in_two_threads(make_pipe, edit):
    pipes = [make_pipe(), make_pipe()]
    specedit.install(pipes[0], steps=(2, 2, 2), draft_steps=2)
    specedit.install(pipes[1], steps=(1, 2, 1), restore="reference", rope="phase_aligned", draft_steps=3)
    masks = [CORNER, CORNER.T[::-1]]
    serial = [[edit(p, seed=seed, edit_mask=masks[i]) for seed in range(4)] for i, p in enumerate(pipes)]
    together = [[], []]

    def work(i):
        together[i] += [edit(pipes[i], seed=seed, edit_mask=masks[i]) for seed in range(4)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(together[i]) == 4 and specedit.report(pipes[i]).nfe == (6, 4)[i]
        for a, b in zip(together[i], serial[i], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("thing", [None, 3, "pipe", object(), torch.nn.Linear(1, 1), FluxKontextPipeline])
def test_another_kind_of_pipeline(thing):
    with pytest.raises(TypeError, match=r"install: expected one of FluxKontextPipeline, QwenImageEditPipeline, .*got"):
        specedit.install(thing)
    assert specedit.uninstall(thing) is thing


def test_a_wrong_configuration_leaves_the_pipeline_alone(pipe, check_untouched):
    check = check_untouched(pipe)
    for arguments, error in (
        (dict(config="trubo"), ValueError),
        (dict(threshold=9), ValueError),
        (dict(steps=(1, 2)), ValueError),
        (dict(steeps=(1, 2, 3)), TypeError),
        (dict(rope="phase_aligned", attention="stock"), ValueError),
        (dict(config=7), TypeError),
    ):
        with pytest.raises(error, match=r"expected|not a field"):
            specedit.install(pipe, **arguments)
        assert type(pipe) is FluxKontextPipeline
    specedit.install(pipe, "turbo")
    with pytest.raises(ValueError, match="did you mean 'balanced'"):
        specedit.install(pipe, "balancd")
    check()


@pytest.mark.parametrize("version", ["0.35.2", "0.9.0", "0.35.0.dev0"])
def test_a_diffusers_that_is_too_old(pipe, monkeypatch, version):
    monkeypatch.setattr(diffusers, "__version__", version)
    with pytest.raises(ImportError, match=f"expected diffusers >= 0.36, got {version}"):
        specedit.install(pipe)
    assert type(pipe) is FluxKontextPipeline


@pytest.mark.parametrize("version", ["0.36.0", "0.37.0.dev0", "1.0.0"])
def test_a_diffusers_that_is_new_enough(pipe, monkeypatch, version):
    monkeypatch.setattr(diffusers, "__version__", version)
    assert is_active(specedit.install(pipe))


# ------------------------------------------------------------------------------------------- stock path, one warning


def stock_path(pipe, call):
    """Calls twice: the stock pipeline's own result both times, and one warning that points here. Returns its text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = [call(pipe), call(pipe)]
    caught = [w for w in caught if "SpecEdit" in str(w.message)]
    specedit.uninstall(pipe)
    stock = call(pipe)
    assert torch.equal(images[0], stock) and torch.equal(images[1], stock)
    assert [w.category for w in caught] == [UserWarning]
    return str(caught[0].message)


def test_text_to_image(pipe, edit):
    specedit.install(pipe)
    text = stock_path(pipe, lambda p: edit(p, image=None, num_inference_steps=2))
    assert text == "SpecEdit runs the stock pipeline: there is no image to edit"


def test_sigmas(pipe, edit):
    specedit.install(pipe)
    assert "sigmas were given" in stock_path(pipe, lambda p: edit(p, sigmas=[1.0, 0.5]))


def test_the_warning_points_to_the_call(pipe, edit, picture):
    specedit.install(pipe)
    size = dict(height=64, width=64, max_area=64 * 64, max_sequence_length=16, num_inference_steps=1)
    with pytest.warns(UserWarning, match="no image to edit") as caught:
        pipe(prompt="a", output_type="latent", **size)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("scheduler", "word"),
    [
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, stochastic_sampling=True), "stochastic_sampling"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, invert_sigmas=True), "invert_sigmas"),
    ],
    ids=["stochastic", "inverted"],
)
def test_schedulers_that_are_not_plain(make_pipe, edit, scheduler, word):
    pipe = make_pipe(scheduler=scheduler)
    with pytest.warns(UserWarning, match=f"will run the stock pipeline: the scheduler sets {word}") as caught:
        specedit.install(pipe)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # said once, at install
        torch.manual_seed(0)
        ours = edit(pipe, num_inference_steps=2)
    specedit.uninstall(pipe)
    torch.manual_seed(0)
    assert torch.equal(edit(pipe, num_inference_steps=2), ours)


def test_a_scheduler_swapped_after_install(pipe, edit):
    specedit.install(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, invert_sigmas=True)
    assert "invert_sigmas" in stock_path(pipe, lambda p: edit(p, num_inference_steps=2))


def test_heun_runs_what_the_stock_pipeline_makes_of_it(make_pipe, edit):
    pipe = make_pipe(scheduler=FlowMatchHeunDiscreteScheduler())
    with pytest.raises(Exception) as stock:  # this pipeline passes sigmas, which Heun does not take
        edit(pipe, num_inference_steps=2)
    with pytest.warns(UserWarning, match="the scheduler is FlowMatchHeunDiscreteScheduler"):
        specedit.install(pipe)
    with pytest.raises(type(stock.value)) as ours:
        edit(pipe, num_inference_steps=2)
    assert str(ours.value) == str(stock.value)


def give_ip_adapter(pipe):
    """What loading an IP-Adapter leaves on a pipeline, with random weights."""
    torch.manual_seed(0)
    transformer = pipe.transformer
    parts = {
        name: type(processor)()
        if name.startswith("single")
        else FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32, num_tokens=(2,))
        for name, processor in transformer.attn_processors.items()
    }
    transformer.set_attn_processor(parts)
    transformer.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(8, 32, 2)]).eval()


@pytest.mark.parametrize("first", ["install", "adapter"])
def test_ip_adapter(pipe, edit, first):
    if first == "install":
        specedit.install(pipe)
    give_ip_adapter(pipe)
    if first == "adapter":
        specedit.install(pipe)
    embeds = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0))
    arguments = dict(ip_adapter_image_embeds=[embeds], negative_ip_adapter_image_embeds=[embeds])
    text = stock_path(pipe, lambda p: edit(p, num_inference_steps=2, **arguments))
    assert "ip_adapter_image_embeds needs the stock attention processors" in text
    assert sum(isinstance(p, FluxIPAdapterAttnProcessor) for p in processors(pipe)) == 1


@pytest.fixture
def cached():
    """Enables a diffusers cache on a pipeline, and disables it in the end."""
    pipes = []

    def enable(pipe):
        pipes.append(pipe)
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: 500,
        )  # fmt: skip
        pipe.transformer.enable_cache(config)

    yield enable
    for pipe in pipes:
        pipe.transformer.disable_cache()


def test_a_diffusers_cache_enabled_before(pipe, edit, cached):
    cached(pipe)
    with pytest.warns(UserWarning, match="will run the stock pipeline: a diffusers cache is enabled") as caught:
        specedit.install(pipe)
    assert caught[0].filename == __file__ and len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = edit(pipe, num_inference_steps=2)
    pipe.transformer.disable_cache()
    specedit.uninstall(pipe)
    cached(pipe)
    assert torch.equal(edit(pipe, num_inference_steps=2), ours)


def test_a_diffusers_cache_enabled_after(pipe, edit, cached):
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    cached(pipe)
    with pytest.warns(UserWarning, match="runs the stock pipeline: a diffusers cache is enabled"):
        edit(pipe, num_inference_steps=1)
    pipe.transformer.disable_cache()
    assert torch.equal(edit(pipe), expected)


def test_cache_dit_enabled_before(make_pipe, edit):
    class Cached(FluxKontextPipeline):
        """As cache-dit leaves it: a class of its own around the pipeline's."""

    Cached.__module__ = "cache_dit.caching"
    pipe = make_pipe(Cached)
    with pytest.warns(UserWarning, match="cache-dit is enabled on this pipeline") as caught:
        specedit.install(pipe, **QUICK)
    assert caught[0].filename == __file__ and len(caught) == 1
    edit(pipe)
    assert specedit.report(pipe).nfe == 3


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_the_timestep_is_the_stages_sigma_and_is_made_on_the_device(pipe, edit):
    seen = []

    class Constants(TorchDispatchMode):
        def __torch_dispatch__(self, function, classes, args=(), kwargs=None):
            assert function is not torch.ops.aten.lift_fresh.default, "a value was sent from the host"
            return function(*args, **kwargs or {})

    def callback(pipe, index, timestep, kwargs):
        seen.append(timestep)
        return {}

    specedit.install(pipe, "turbo")
    edit(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[])
    assert [t.dtype for t in seen] == [torch.float32] * 9 and all(t.ndim == 0 for t in seen)
    assert seen[0].item() == 1000 and all(a > b for a, b in pairwise(seen[2:]))
    state = types.SimpleNamespace(device=torch.device("cpu"))
    listener = _Listener(
        pipe, dict(callback_on_step_end=None, callback_on_step_end_tensor_inputs=[]), state, tqdm(disable=True)
    )
    with Constants():
        listener.step(0, 0.1234, lambda: None)
    assert torch.equal(pipe.current_timestep, torch.tensor(0.1234 * 1000))


def test_an_exception_in_a_callback(pipe, edit, check_untouched):
    check = check_untouched(pipe)
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    for step in range(3):

        def callback(pipe, index, timestep, kwargs, step=step):
            if index == step:
                raise KeyError("mine")
            return {}

        with pytest.raises(KeyError, match="mine"):
            edit(pipe, callback_on_step_end=callback)
        assert pipe.current_timestep is None
        assert torch.equal(edit(pipe), expected)
    check()


def test_an_exception_in_the_transformer(pipe, edit, check_untouched):
    check = check_untouched(pipe)
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    for failing in range(4):  # the draft, then every stage
        calls = []

        def fail(module, inputs, calls=calls, failing=failing):
            calls.append(1)
            if len(calls) > failing:
                raise MemoryError("out of it")

        handle = pipe.transformer.single_transformer_blocks[0].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError, match="out of it"):
            edit(pipe)
        handle.remove()
        assert len(calls) == failing + 1 and torch.equal(edit(pipe), expected)
    check()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(image=Image.new("RGBA", (128, 128))), ValueError, "expected an RGB picture, got mode 'RGBA'"),
        (dict(image=Image.new("L", (128, 128))), ValueError, "expected an RGB picture, got mode 'L'"),
        (dict(image=Image.new("RGB", (40, 40))), ValueError, "expected at least 64 px a side, got 40 x 40"),
        (dict(image="photo.png"), TypeError, "expected a PIL image, array or tensor, got str"),
        (dict(edit_mask=np.zeros((5, 5))), ValueError, "expected some nonzero pixels, got an empty mask"),
        (dict(edit_mask=np.full((5, 5), np.nan)), ValueError, "expected finite values, got NaN"),
        (dict(edit_mask=np.ones((3, 5, 5))), ValueError, "expected 1 mask or 1, one for each image, got 3"),
        (dict(edit_mask=np.ones((2, 3, 5, 5))), ValueError, r"expected \(H, W\).*got \(2, 3, 5, 5\)"),
        (dict(edit_mask="all"), TypeError, "edit_mask: expected a PIL image, array or tensor, got str"),
        (dict(prompt=7), ValueError, "`prompt` has to be of type"),
        (dict(max_sequence_length=600), ValueError, "cannot be greater than 512"),
        (dict(no_such_argument=1), TypeError, "no_such_argument"),
    ],
)
def test_bad_arguments_leave_the_pipeline_usable(pipe, edit, check_untouched, arguments, error, message):
    check = check_untouched(pipe)
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    with pytest.raises(error, match=message):
        edit(pipe, **arguments)
    assert torch.equal(edit(pipe), expected)
    check()


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (100, 37), (700, 900)])
def test_masks_of_any_size(pipe, edit, size):
    specedit.install(pipe, **QUICK)
    everything = edit(pipe, edit_mask=np.ones((128, 128)))
    assert torch.equal(edit(pipe, edit_mask=np.ones(size, dtype=np.uint8)), everything)
    assert specedit.report(pipe).edit_fraction == 1


def test_attention_that_cannot_run_here_does_not_fall_back(pipe, edit, check_untouched):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    check = check_untouched(pipe)
    specedit.install(pipe, **QUICK, attention="triton")
    with pytest.raises(ValueError, match="expected CUDA tensors"):
        edit(pipe)
    check()


def test_the_call_keeps_the_stock_documentation(pipe):
    specedit.install(pipe)
    assert isinstance(pipe.__call__, types.MethodType) and type(pipe).__doc__ == FluxKontextPipeline.__doc__


def test_inpaint_pipelines_stay_stock_with_one_warning(pipe):
    from diffusers import FluxKontextInpaintPipeline

    pipe = FluxKontextInpaintPipeline(**pipe.components)
    before = dict(vars(pipe))
    with pytest.warns(UserWarning, match="FluxKontextInpaintPipeline.*stock path") as caught:
        assert specedit.install(pipe, "turbo") is pipe
    assert len(caught) == 1 and type(pipe) is FluxKontextInpaintPipeline and dict(vars(pipe)).keys() == before.keys()
    specedit.uninstall(pipe)


def test_a_stock_call_leaves_no_old_report(pipe, edit):
    specedit.install(pipe, **QUICK)
    edit(pipe)
    assert specedit.report(pipe).nfe == 3
    with pytest.warns(UserWarning, match="sigmas"):
        edit(pipe, sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="at least one accelerated call"):
        specedit.report(pipe)


def test_prompts_of_different_length_are_refused(pipe, edit):
    specedit.install(pipe, **QUICK)
    with pytest.raises(ValueError, match="negative prompt: expected encoder_hidden_states of shape"):
        edit(pipe, prompt=["a", "b"], negative_prompt="c", true_cfg_scale=2.0)
