"""On and off a pipeline: what is swapped, and what comes back."""

import copy
import json
import pickle
import threading
import types
from itertools import pairwise

import pytest
import torch
from diffusers import FluxKontextPipeline
from torch.utils._python_dispatch import TorchDispatchMode

import specedit
from specedit.api.installing import is_active, last_report
from specedit.method.adapter import Run
from tests.api.common import CORNER, QUICK, processors, same_objects


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_uninstall_without_the_transformer(pipe, edit, check_untouched):
    check = check_untouched(pipe)
    specedit.install(pipe, **QUICK)
    model, pipe.transformer = pipe.transformer, None  # taken away to free memory
    with pytest.raises(ValueError, match="expected a FluxKontextPipeline with a transformer, got one without"):
        edit(pipe)
    assert specedit.uninstall(pipe) is pipe and not is_active(pipe) and type(pipe) is FluxKontextPipeline
    pipe.transformer = model
    specedit.install(pipe, **QUICK)
    edit(pipe)
    assert specedit.report(pipe).nfe == 3
    check()


def test_uninstall_after_another_engine_came(pipe, edit):
    specedit.install(pipe, **QUICK)
    model, pipe.transformer = pipe.transformer, torch.nn.Linear(1, 1)
    assert type(specedit.uninstall(pipe)) is FluxKontextPipeline and not is_active(pipe)
    specedit.install(pipe, **QUICK)  # it has none of the model's blocks
    specedit.uninstall(pipe)
    pipe.transformer = model


@pytest.mark.slow
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
    with pytest.raises(ValueError, match="the last one ran the stock pipeline: SpecEdit was disabled"):
        specedit.report(pipe)
    with pytest.raises(ValueError, match="got a plain NoneType"):
        specedit.report(None)


@pytest.mark.slow
def test_disabled_runs_the_stock_call(pipe, edit):
    stock = edit(pipe, num_inference_steps=3)
    specedit.install(pipe, **QUICK)
    accelerated = edit(pipe)
    assert last_report(pipe).nfe == 3
    with specedit.disabled(pipe) as same:
        assert same is pipe and not is_active(pipe)
        assert torch.equal(edit(pipe, num_inference_steps=3), stock)
        assert last_report(pipe) is None  # nor is an earlier one given out
        with pytest.warns(UserWarning, match="disabled here; edit_mask not applied"):
            assert torch.equal(edit(pipe, num_inference_steps=3, edit_mask=CORNER), stock)
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda pipe: pickle.loads(pickle.dumps(pipe))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_a_copy_of_an_installed_pipeline(pipe, edit, duplicate, check_untouched):
    check, stock = check_untouched(pipe), edit(pipe, num_inference_steps=3)
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    other = duplicate(pipe)
    assert type(other) is not type(pipe) and isinstance(other, FluxKontextPipeline) and is_active(other)
    with pytest.raises(ValueError, match="got none since install"):
        specedit.report(other)
    assert torch.equal(edit(other), expected)
    specedit.uninstall(other)
    assert type(other) is FluxKontextPipeline and torch.equal(edit(other, num_inference_steps=3), stock)
    assert is_active(pipe) and specedit.report(pipe).nfe == 3 and torch.equal(edit(pipe), expected)
    check()


@pytest.mark.slow
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


@pytest.mark.slow
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
    run = Run(None, pipe, None, state)
    with Constants():
        run.set_current_timestep(0.1234)
    assert torch.equal(pipe.current_timestep, torch.tensor(0.1234 * 1000))


def test_the_call_keeps_the_stock_documentation(pipe):
    specedit.install(pipe)
    assert isinstance(pipe.__call__, types.MethodType) and type(pipe).__doc__ == FluxKontextPipeline.__doc__
