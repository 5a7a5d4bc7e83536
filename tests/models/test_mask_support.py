"""attention="stock" with attention backends that take no mask: refused before any work."""

import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend

import specedit
from specedit import SpecEditConfig
from specedit.models.attention import mask_support

STOCK = dict(attention="stock", steps=(2, 1, 1), draft_steps=2)
REFUSED = "attention: expected an attention backend that takes a mask .* got '_native_flash'; key_bias='none'"


@pytest.fixture(autouse=True)
def same_backend_afterwards(monkeypatch):
    """`set_attention_backend` sets the default of the whole process too."""
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)


@pytest.mark.parametrize("name", ["flash", "_native_flash", "sage", "flash_varlen", "_native_npu", "_flash_3"])
def test_backends_without_a_mask_are_known(name):
    assert not mask_support.takes_mask(name)


@pytest.mark.parametrize("name", ["native", "_native_math", "_native_efficient", "_native_cudnn", "flex", "xformers"])
def test_backends_with_a_mask_are_known(name):
    assert mask_support.takes_mask(name)


def test_an_error_of_another_cause_is_no_refusal():
    def missing(**call):
        raise ValueError("no such device")

    assert not mask_support.refuses_mask(missing)


def refuse_work(*_, **__):
    raise AssertionError("work was done")


def test_a_backend_without_a_mask_is_refused_before_any_work(pipe, edit, monkeypatch):
    before = edit(pipe, num_inference_steps=1)
    pipe.transformer.set_attention_backend("_native_flash")
    specedit.install(pipe, **STOCK)
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe), "encode_prompt", refuse_work)
        patch.setattr(type(pipe), "prepare_latents", refuse_work)
        with pytest.raises(ValueError, match=REFUSED):
            edit(pipe)
    pipe.transformer.set_attention_backend("native")
    edit(pipe)
    assert specedit.report(pipe).nfe == 4
    specedit.uninstall(pipe)
    assert (edit(pipe, num_inference_steps=1) == before).all()


def test_the_backend_of_a_block_of_code_counts_too(make_qwen, picture):
    pipe = specedit.install(make_qwen(), **STOCK)
    call = dict(image=picture(128, 128), prompt="make it red", height=128, width=128, output_type="latent")
    with attention_backend("_native_flash"), pytest.raises(ValueError, match=REFUSED):
        pipe(**call)
    pipe(**call)
    assert specedit.report(pipe).nfe == 4


@pytest.mark.parametrize("changes", [{"key_bias": "none"}, {"steps": (2, 0, 2)}, {"attention": "torch"}])
def test_a_run_that_needs_no_mask_takes_any_backend(pipe, edit, changes):
    pipe.transformer.set_attention_backend("_native_flash")
    specedit.install(pipe, **STOCK | changes)
    edit(pipe)
    assert specedit.report(pipe).nfe == 4


def test_a_method_that_adds_no_bias_needs_no_mask(pipe):
    config = SpecEditConfig(method="ralu", attention="stock")
    pipe.transformer.set_attention_backend("_native_flash")
    specedit.install(pipe, config)
    mask_support.check(pipe.transformer, config)
