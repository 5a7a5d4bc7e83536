"""Installed pipelines whose weights are moved, cast, compiled, tiled or copied into another pipeline."""

import copy
import warnings

import pytest
import torch
from diffusers import FluxKontextInpaintPipeline, FluxKontextPipeline

import specedit
from tests.api.common import CORNER, QUICK


@pytest.fixture
def make_own(make_pipe):
    """Makes pipelines that share no weights: what happens here changes them in place."""

    def make():
        pipe = make_pipe()
        for name in ("text_encoder", "text_encoder_2", "vae"):
            setattr(pipe, name, copy.deepcopy(getattr(pipe, name)))
        return pipe

    return make


def offload_models(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_modules(pipe):
    from accelerate import cpu_offload

    for model in (pipe.transformer, pipe.vae):
        cpu_offload(model, torch.device("cpu"))


def offload_groups(pipe):
    from diffusers.hooks import apply_group_offloading

    how = dict(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level")
    try:
        apply_group_offloading(torch.nn.Sequential(torch.nn.Linear(1, 1)), **how)
    except AttributeError:
        pytest.skip("this diffusers asks torch for the accelerator, and there is none")
    for model in (pipe.transformer, pipe.vae):
        apply_group_offloading(model, **how)


def compile_transformer(pipe):
    torch._dynamo.reset()  # what other tests compiled counts towards the limit
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def compile_blocks(pipe):
    torch._dynamo.reset()  # what other tests compiled counts towards the limit
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")


def slice_batches(pipe):
    pipe.vae.enable_slicing()


def set_backend(pipe):
    pipe.transformer.set_attention_backend("native")


PLAIN = [offload_models, offload_modules, offload_groups, slice_batches, set_backend]
COMPILING = [compile_transformer, compile_blocks]


# What is compiled before it is installed, and drafts: test_compiling_changes_nothing, tests/models/test_graphs.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "change"),
    [
        *((first, change) for first in ("install", "change") for change in PLAIN),
        *(pytest.param("install", change, marks=pytest.mark.thorough) for change in COMPILING),
    ],
)
def test_the_same_edit_whatever_becomes_of_the_weights(make_own, edit, change, first):
    pipe = make_own()
    calls = [dict(edit_mask=CORNER, output_type="pt")]
    if change not in COMPILING:
        calls.append({})
    stock = edit(pipe, num_inference_steps=2)
    specedit.install(pipe, **QUICK)
    expected = [edit(pipe, **call) for call in calls]
    if first == "change":
        specedit.uninstall(pipe)
    change(pipe)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SpecEdit")  # nothing runs the stock path
        specedit.install(pipe, **QUICK)
        for call, wanted in zip(calls, expected, strict=True):
            torch.testing.assert_close(edit(pipe, **call), wanted, rtol=1e-5, atol=1e-5)
    specedit.uninstall(pipe)
    assert type(pipe) is FluxKontextPipeline and not any(hasattr(m, "original") for m in pipe.transformer.modules())
    torch.testing.assert_close(edit(pipe, num_inference_steps=2), stock, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_tiles(make_own, edit):
    pipe = make_own()
    pipe.vae.enable_tiling()
    stock = edit(pipe, num_inference_steps=2, output_type="pt")
    specedit.install(pipe, steps=(0, 0, 2))
    torch.testing.assert_close(edit(pipe, output_type="pt"), stock, rtol=1e-5, atol=1e-5)
    for verify_at in ("full", "draft"):
        specedit.install(pipe, **QUICK, verify_at=verify_at)
        assert edit(pipe, output_type="pt").isfinite().all()
        assert specedit.report(pipe).score.shape == (1, 8, 8)


@pytest.mark.slow
def test_another_dtype_after_install(make_own, edit):
    pipe, other = make_own(), make_own()
    specedit.install(pipe, **QUICK, keep_pixels=True)
    edit(pipe)
    for p in (pipe, other):
        p.to(torch.bfloat16)
    assert edit(pipe, edit_mask=CORNER).dtype == torch.bfloat16
    assert edit(pipe, edit_mask=CORNER, output_type="pil")[0].size == (128, 128)
    specedit.uninstall(pipe)
    assert torch.equal(edit(pipe, num_inference_steps=2), edit(other, num_inference_steps=2))


@pytest.mark.slow
def test_another_pipeline_from_an_installed_one(make_own, edit):
    pipe = make_own()
    stock = edit(pipe, num_inference_steps=2)
    specedit.install(pipe, **QUICK)
    expected = edit(pipe)
    other = FluxKontextPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert type(other) is FluxKontextPipeline and torch.equal(edit(other, num_inference_steps=2), stock)
    assert type(FluxKontextInpaintPipeline.from_pipe(pipe)) is FluxKontextInpaintPipeline
    assert torch.equal(edit(pipe), expected)
