"""Calls of FLUX.2's pipelines: references, sizes, LoRA, callbacks, errors, and what runs stock."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import specedit
from specedit.layout import MixedLayout
from specedit.models import flux2
from specedit.models.flux2.attention import WRAPPERS
from specedit.models.shared import decode_boxes
from tests.models.whole_calls import (
    CORNER,
    QUICK,
    assert_a_lora_acts_as_in_stock,
    assert_images_come_as_stock_gives_them,
    close,
    save_lora,
)

# -------------------------------------------------------------------------------------------------- several references


@pytest.mark.slow
def test_several_references_equal_stock(family, picture):
    """Of other sizes too, by odd numbers of tokens, and for several prompts at once."""
    for images in (
        [picture(128, 128), picture(80, 112, 1)],
        [picture(144, 112), picture(64, 64, 1), picture(96, 80, 2)],
    ):
        call = dict(image=images, prompt=["red", "make it large"])
        stock = family.run(family.make(), num_inference_steps=3, **call)
        pipe = specedit.install(family.make(), steps=(0, 0, 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the grids differ
            close(family.run(pipe, **call), stock)
        for restore in ("full", "reference"):
            specedit.install(pipe, restore=restore, **QUICK)
            assert family.run(pipe, **call).isfinite().all()


def test_references_lie_ten_apart_in_time(family, picture):
    adapter, state = family.prepare(family.make(), image=[picture(128, 128), picture(80, 112), picture(64, 64)])
    layout = MixedLayout.all_fine(state.grid)
    ids = adapter.position_ids(state, layout, state.beside(layout))
    stock = family.make()
    latents = [torch.zeros(1, 16, *grid.shape) for grid in state.reference_grid.grids]
    expected = torch.cat([stock._prepare_latent_ids(torch.zeros(1, 16, 8, 8))[0], stock._prepare_image_ids(latents)[0]])
    assert torch.equal(ids, expected.float()) and ids[:, 0].unique().tolist() == [0, 10, 20, 30]


def test_the_first_reference_is_edited(family, picture):
    images = [picture(128, 128, 3), picture(128, 128, 4)]
    pipe = family.make()
    adapter, state = family.prepare(pipe, image=images)
    _, alone = family.prepare(family.make(), image=images[0])
    assert state.edited == 0 and torch.equal(state.aligned, alone.reference)
    specedit.install(pipe, restore="reference", **QUICK)
    pipe(**family.call(128, 128) | dict(image=images, edit_mask=CORNER, output_type="pt"))
    out = specedit.install(pipe, keep_pixels=True, **QUICK)(
        **family.call(128, 128) | dict(image=images, edit_mask=CORNER, output_type="np")
    ).images[0]
    own = np.asarray(images[0], dtype=np.float32) / 255
    np.testing.assert_array_equal(out[64:, 64:], own[64:, 64:])


# --------------------------------------------------------------------------------------------------------------- sizes


def test_without_a_size_the_output_takes_the_first_references(family, picture):
    call = dict(image=[picture(90, 140), picture(64, 64)], height=None, width=None, output_type="np")
    stock = family.run(family.make(), num_inference_steps=1, **call)
    pipe = specedit.install(family.make(), steps=(0, 0, 1))
    ours = family.run(pipe, **call)
    assert ours.shape == stock.shape == (1, 80, 128, 3)
    np.testing.assert_allclose(ours, stock, atol=2e-4)


@pytest.mark.parametrize("size", [(300, 200), (4032, 3024), (1920, 1080), (1025, 1024), (64, 500)])
def test_size_for_is_stocks_own_size(family_of, size):
    family = family_of()
    pipe = family.make()
    given = specedit.size_for(pipe, Image.new("RGB", size))
    taken = flux2.edit.pictures.taken_picture(pipe, Image.new("RGB", size))
    assert given == dict(height=taken.height, width=taken.width)
    assert given["height"] * given["width"] <= 1024**2


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_pictures_of_any_mode_are_converted_as_stock_does(family_of, picture, mode):
    family, image = family_of(), picture(128, 128).convert(mode)
    stock = family.run(family.make(), num_inference_steps=1, image=image)
    close(family.run(specedit.install(family.make(), steps=(0, 0, 1)), image=image), stock)


def test_images_come_as_stock_gives_them(family):
    assert_images_come_as_stock_gives_them(family)


def test_given_latents_and_embeddings(family):
    pipe, draw = family.make(), torch.Generator().manual_seed(3)
    latents, embeds = torch.randn(1, 16, 8, 8, generator=draw), torch.randn(1, 16, 32, generator=draw)
    call = dict(latents=latents, prompt_embeds=embeds, prompt=None)
    stock = family.run(pipe, num_inference_steps=2, **call)
    specedit.install(pipe, steps=(0, 0, 2))
    close(family.run(pipe, **call), stock)
    with pytest.raises(ValueError, match=r"latents: expected shape \(1, 16, 8, 8\), got \(1, 64, 16\)"):
        family.run(pipe, latents=torch.randn(1, 64, 16))


# ---------------------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture
def lora(tmp_path_factory):
    """Random LoRA weights of every attention projection, by the layers' names."""
    peft = pytest.importorskip("peft")

    def save(family):
        names = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "to_qkv_mlp_proj", "linear_in"]
        return save_lora(peft, family, names, tmp_path_factory.mktemp("lora"))

    return save


@pytest.mark.slow
def test_lora_by_the_pipelines_own_loader(family, lora):
    assert_a_lora_acts_as_in_stock(family, lora(family))


# --------------------------------------------------------------------------------------------- callbacks, dtypes, modes


def test_callbacks_and_interrupts(family):
    pipe, seen = specedit.install(family.make(), **QUICK), []

    def end(pipe, i, t, tensors):
        seen.append((i, tensors["latents"].shape, tensors["prompt_embeds"].shape))
        pipe._interrupt = i == 2
        return {}

    family.run(pipe, callback_on_step_end=end, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert [i for i, *_ in seen] == [0, 1, 2] and seen[0][1:] == ((1, 64, 16), (1, 16, 32))
    assert specedit.report(pipe).nfe == 3


def test_bfloat16(family):
    pipe = family.make()
    for part in ("transformer", "vae", "text_encoder"):
        getattr(pipe, part).to(torch.bfloat16)
    specedit.install(pipe, restore="reference", **QUICK)
    out = family.run(pipe)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_fused_projections(family):
    pipe = family.make()
    expected = family.run(specedit.install(pipe, **QUICK))
    for block in pipe.transformer.transformer_blocks:
        block.attn.fuse_projections()
    close(family.run(pipe), expected)


def test_distilled_models_have_no_guidance(family_of):
    distilled, base = (family_of(is_distilled=value) for value in (True, False))
    pipe = specedit.install(distilled.make(), **QUICK)
    guided, plain = (distilled.run(pipe, guidance_scale=scale) for scale in (4.0, 1.0))
    assert torch.equal(guided, plain)
    both = specedit.install(base.make(), **QUICK)
    base.run(both, guidance_scale=4.0)
    assert specedit.report(both).flops == 2 * specedit.report(pipe).flops


def test_embeddings_of_the_empty_prompt(family_of):
    family = family_of()
    pipe = specedit.install(family.make(), steps=(0, 0, 2))
    expected = family.run(pipe, guidance_scale=2.5)
    _, state = family.prepare(family.make(), guidance_scale=2.5)
    empty = state.conditioning.negative.embeds
    assert torch.equal(family.run(pipe, guidance_scale=2.5, negative_prompt_embeds=empty), expected)
    with pytest.raises(ValueError, match=r"negative_prompt_embeds: expected shape \(1, 16, 32\).*got \(2, 16, 32\)"):
        family.run(pipe, guidance_scale=2.5, negative_prompt_embeds=empty.repeat(2, 1, 1))
    short = dict(guidance_scale=2.5, negative_prompt_embeds=empty[:, :9])
    with pytest.warns(UserWarning, match="the negative prompt's embeddings have 9 tokens, and the prompt has 16"):
        got = family.run(pipe, num_inference_steps=2, **short)
    assert torch.equal(got, family.run(family.make(), num_inference_steps=2, **short))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [(dict(image=None), "there is no image to edit"), (dict(sigmas=[1.0, 0.5]), "sigmas were given"),
     (dict(height=48), "a picture with fewer than 4 tokens a side")],
)  # fmt: skip
def test_what_runs_stock(family, changes, reason):
    pipe = specedit.install(family.make(), **QUICK)
    with pytest.warns(UserWarning, match=f"SpecEdit runs the stock pipeline: {reason}"):
        got = family.run(pipe, num_inference_steps=2, **changes)
    assert torch.equal(got, family.run(family.make(), num_inference_steps=2, **changes))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [(np.zeros((128, 128, 3), np.float32), TypeError, "image: expected a PIL image or a list of them, got ndarray"),
     ([], ValueError, "image: expected at least one picture, got an empty list"),
     (Image.new("RGB", (60, 60)), ValueError, "Image too small"),
     (Image.new("RGB", (64, 600)), ValueError, "Aspect ratio too extreme")],
)  # fmt: skip
def test_wrong_pictures(family_of, image, error, message):
    family = family_of()
    pipe = specedit.install(family.make(), **QUICK)
    with pytest.raises(error, match=message):
        family.run(pipe, image=image)


def test_the_prompt_of_dev_may_be_rewritten(family_of, monkeypatch):
    family = family_of("Flux2Pipeline")
    pipe = family.make()
    monkeypatch.setattr(type(pipe), "upsample_prompt", lambda self, prompt, **how: [prompt + " and large"])
    stock = family.run(pipe, num_inference_steps=2, caption_upsample_temperature=0.15)
    specedit.install(pipe, steps=(0, 0, 2))
    close(family.run(pipe, caption_upsample_temperature=0.15), stock)
    assert (family.run(pipe) - stock).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------------ klein-KV


@pytest.fixture
def kv(family_of):
    return family_of("Flux2KleinKVPipeline")


def test_the_references_are_computed_by_a_stages_first_step(kv):
    pipe, seen = specedit.install(kv.make(), steps=(2, 2, 2), draft_steps=3), []
    take = lambda module, args, kwargs: seen.append((kwargs["kv_cache_mode"], kwargs["hidden_states"].shape[1]))  # noqa: E731
    handle = pipe.transformer.register_forward_pre_hook(take, with_kwargs=True)
    kv.run(pipe, edit_mask=CORNER)
    handle.remove()
    modes = [mode for mode, _ in seen]
    assert modes == ["extract", "cached"] * 3
    whole, own = seen[-2][1], seen[-1][1]
    assert (whole, own) == (128, 64)
    report = specedit.report(pipe)
    # The largest stage's references: keys and values of 64 tokens, 2 heads of 16, in 3 blocks, float32.
    assert report.cache_bytes == 2 * 64 * 32 * 4 * 3


def test_kept_references_change_nothing(kv, monkeypatch):
    """They are what computing them again in every step would give."""
    kept = kv.run(specedit.install(kv.make(), restore="reference", **QUICK))
    original = flux2.kv.Flux2KleinKV.predict

    def again(self, run, group, sigma, partial=None):
        group.inputs.pop(("kept", False), None)
        return original(self, run, group, sigma, partial)

    monkeypatch.setattr(flux2.kv.Flux2KleinKV, "predict", again)
    close(kv.run(specedit.install(kv.make(), restore="reference", **QUICK)), kept, 1e-5)


def test_every_rope_and_attention_with_kept_references(kv):
    runs = []
    for changes in (dict(rope="phase_aligned"), dict(rope="phase_aligned", attention="torch")):
        runs.append(kv.run(specedit.install(kv.make(), **QUICK, **changes), edit_mask=CORNER))
    close(*runs)
    scaled = kv.run(specedit.install(kv.make(), **QUICK), edit_mask=CORNER)
    assert (scaled - runs[0]).abs().max() > 1e-4


def test_other_pipelines_may_share_its_transformer(kv, family_of):
    klein = family_of()
    own = klein.make()
    expected = klein.run(specedit.install(own, **QUICK))
    pipe = specedit.install(kv.make(), **QUICK)
    edited = kv.run(pipe)
    other = klein.make()
    other.transformer = pipe.transformer
    close(klein.run(specedit.install(other, **QUICK)), expected, 1e-5)
    assert torch.equal(kv.run(pipe), edited)


def test_processors_without_kept_references_run_stock(kv):
    pipe = kv.make()
    specedit.install(pipe, **QUICK)
    attn = pipe.transformer.transformer_blocks[0].attn
    plain = next(kind for kind in WRAPPERS if kind.__name__ == "Flux2AttnProcessor")
    attn.set_processor(plain())
    with pytest.warns(UserWarning, match="its attention processor Flux2AttnProcessor keeps no references"):
        got = kv.run(pipe, num_inference_steps=2)
    other = kv.make()
    other.transformer.transformer_blocks[0].attn.set_processor(plain())
    assert torch.equal(got, kv.run(other, num_inference_steps=2))


def test_boxes_are_not_decoded_because_no_trained_autoencoder_was_measured(family):
    with pytest.raises(ValueError, match=r"^decode: expected 'full' for flux2.*, got 'edited'"):
        specedit.install(family.make(), **QUICK, keep_pixels=True, decode="edited")
    vae = family.make().vae
    assert decode_boxes.decoded_part(vae, torch.zeros(1, 4, 64, 64), torch.ones(1, 16, 16, dtype=torch.bool), 4) is None
