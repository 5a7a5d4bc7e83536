"""reuse_encodings: equal bits, what ends what was kept, its bounds, and what the report says."""

import copy
import gc
import json
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import FluxKontextPipeline

import specedit
from specedit.api.encodings import Kept, Reuse
from specedit.api.installation import installation_of
from tests.api.common import CORNER, QUICK

REUSING = QUICK | dict(reuse_encodings=True)
AGAIN = {"prompts": 1, "pictures": 1, "findings": 1}


@pytest.fixture
def own(make_pipe):
    """A pipeline that shares no weights: what happens here changes them in place."""
    pipe = make_pipe()
    for name in ("text_encoder", "text_encoder_2", "vae"):
        setattr(pipe, name, copy.deepcopy(getattr(pipe, name)))
    return pipe


def encoders(pipe):
    return pipe.text_encoder, pipe.text_encoder_2, pipe.vae.encoder


def reused(pipe):
    return specedit.report(pipe).reused


# --------------------------------------------------------------------------------------------- what is reused, and said


@pytest.mark.thorough
def test_another_seed_encodes_and_drafts_nothing(pipe, edit, count_calls):
    specedit.install(pipe, **REUSING)
    first, calls = edit(pipe), count_calls(*encoders(pipe))
    report = specedit.report(pipe)
    assert report.reused == {} and report.draft_steps == 1 and "reused" not in report.title()
    assert torch.equal(edit(pipe), first) and not torch.equal(edit(pipe, seed=1), first)
    report = specedit.report(pipe)
    assert not calls and report.reused == AGAIN and report.draft_steps == 0
    assert "draft" not in [stage.name for stage in report.stages]
    assert report.title().endswith("reused 1 prompt, 1 picture, 1 finding of an earlier draft")
    assert json.loads(json.dumps(report.to_dict()))["reused"] == AGAIN


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (dict(prompt="make it blue"), {"pictures": 1}),
        (dict(max_sequence_length=8), {"pictures": 1}),
        (dict(size=(96, 160)), {"prompts": 1}),
        (dict(negative_prompt="blue", true_cfg_scale=2.5), {"prompts": 1, "pictures": 1}),
        (dict(num_inference_steps=4), {"prompts": 1, "pictures": 1}),
        (dict(guidance_scale=2.0), {"prompts": 1, "pictures": 1}),
        (dict(num_images_per_prompt=2), {"pictures": 1}),
        (dict(edit_mask=CORNER), {"prompts": 1, "pictures": 1}),
        (dict(output_type="pt"), AGAIN),
    ],
)
def test_a_changed_argument_makes_anew_what_it_decides(make_pipe, edit, change, kept):
    fresh, pipe = specedit.install(make_pipe(), **QUICK), specedit.install(make_pipe(), **REUSING)
    edit(pipe)
    assert torch.equal(torch.as_tensor(edit(pipe, **change)), torch.as_tensor(edit(fresh, **change)))
    assert reused(pipe) == kept


def test_given_embeddings_are_the_callers(pipe, edit):
    embeds, pooled, _ = pipe.encode_prompt("make it red", None, max_sequence_length=16)
    specedit.install(pipe, **REUSING)
    for expected in ({}, {"pictures": 1, "findings": 1}):
        edit(pipe, prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled)
        assert reused(pipe) == expected


def test_another_seed_has_the_random_stream_of_a_run_with_a_draft(pipe, edit, monkeypatch):
    """The finding is the first seed's; all else is as if a draft had been made."""
    specedit.install(pipe, **QUICK, reuse_encodings=True)
    streams = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        edit(pipe, generator=generator)
        streams.append(generator.get_state())
    assert torch.equal(*streams) and reused(pipe) == AGAIN


def test_a_draft_without_a_finding_is_made_again(pipe, edit):
    specedit.install(pipe, **REUSING, threshold=4.0)  # which no score reaches
    edit(pipe)
    assert specedit.report(pipe).empty_drafts == 1
    edit(pipe)
    assert reused(pipe) == {"prompts": 1, "pictures": 1} and specedit.report(pipe).draft_steps == 1


def test_an_interrupted_draft_is_not_kept(pipe, edit):
    specedit.install(pipe, **QUICK | dict(draft_steps=3), reuse_encodings=True)
    stop = pipe.transformer.register_forward_hook(lambda *_: setattr(pipe, "_interrupt", True))
    edit(pipe)
    stop.remove()
    edit(pipe)
    assert reused(pipe) == {"prompts": 1, "pictures": 1} and specedit.report(pipe).draft_steps == 3


@pytest.mark.thorough
def test_what_a_callback_writes_into_embeddings_ends_with_its_call(pipe, edit):
    specedit.install(pipe, **REUSING)
    first = edit(pipe)

    def spoil(pipe, i, t, tensors):
        tensors["prompt_embeds"].zero_()
        return {}

    for _ in range(2):  # once with fresh embeddings, once with those that were kept
        edit(pipe, prompt="make it blue", callback_on_step_end=spoil,
             callback_on_step_end_tensor_inputs=["prompt_embeds"])  # fmt: skip
    blue = edit(pipe, prompt="make it blue")
    assert torch.equal(edit(pipe), first)
    specedit.install(pipe, **QUICK)
    assert torch.equal(edit(pipe, prompt="make it blue"), blue)


@pytest.mark.thorough
def test_the_drafts_own_small_picture_is_encoded_once(make_small_qwen, picture):
    small = dict(steps=(1, 1, 1), draft_steps=1, draft_condition="small")
    call = dict(image=picture(96, 96), prompt="make it red", output_type="latent", height=96, width=96)

    def run(pipe, prompt="make it red"):
        return pipe(**call | dict(prompt=prompt, generator=torch.Generator().manual_seed(0))).images

    pipe = specedit.install(make_small_qwen(), **small)
    expected = run(pipe)
    specedit.install(pipe, **small, reuse_encodings=True, threshold=4.0)  # no finding, so a draft each time
    run(pipe), run(pipe)
    assert reused(pipe) == {"prompts": 2, "pictures": 1}
    specedit.install(pipe, **small, reuse_encodings=True)
    assert torch.equal(run(pipe), expected) and torch.equal(run(pipe), expected)


# -------------------------------------------------------------------------------------------------- what ends all of it


def add_lora(pipe):
    peft = pytest.importorskip("peft")
    pipe.transformer.add_adapter(
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False), "a"
    )


def scale_lora(pipe):
    pipe.set_adapters(["a"], [0.5])


def switch_lora_off(pipe):
    pipe.disable_lora()


def fuse_and_unfuse(pipe):
    pipe.fuse_lora()
    pipe.unfuse_lora()


def fuse_and_unload(pipe):
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def change_in_place(pipe):
    with torch.no_grad():
        pipe.text_encoder_2.shared.weight.mul_(1.5)


def load_weights(pipe):
    pipe.vae.load_state_dict({name: value * 1.1 for name, value in pipe.vae.state_dict().items()})


def replace_encoder(pipe):
    pipe.text_encoder_2 = copy.deepcopy(pipe.text_encoder_2)
    change_in_place(pipe)


def round_weights(pipe):
    pipe.text_encoder_2.half().float()


def cast(pipe):
    pipe.to(torch.bfloat16)


def tile(pipe):
    pipe.vae.enable_tiling()


def replace_scheduler(pipe):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, base_shift=1.0)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("before", "change"),
    [
        (None, add_lora), (add_lora, scale_lora), (add_lora, switch_lora_off), (add_lora, fuse_and_unfuse),
        (add_lora, fuse_and_unload), (None, change_in_place), (None, load_weights), (None, replace_encoder),
        (None, round_weights), (None, cast), (None, tile), (None, replace_scheduler),
    ],
)  # fmt: skip
def test_a_change_of_weights_or_settings_ends_it(own, edit, before, change):
    if before is not None:
        before(own)
    specedit.install(own, **REUSING)
    edit(own), edit(own)
    assert reused(own) == AGAIN
    change(own)
    after = edit(own)
    assert reused(own) == {}
    edit(own)
    assert reused(own) == AGAIN
    specedit.install(own, **QUICK)
    assert torch.equal(edit(own), after)


@pytest.mark.thorough
def test_a_pipeline_that_shares_the_encoder_sees_its_change(own, make_pipe, edit):
    other = make_pipe()
    other.text_encoder_2 = own.text_encoder_2
    for pipe in (own, other):
        edit(specedit.install(pipe, **REUSING))
    change_in_place(own)
    edit(other)
    assert reused(other) == {}


@pytest.mark.thorough
def test_encoders_that_draw_random_numbers_are_run_each_time(own, edit):
    own.text_encoder_2.train()  # dropout
    specedit.install(own, **REUSING)
    first, second = edit(own), edit(own)
    assert reused(own) == {"pictures": 1} and not torch.equal(first, second)


def test_what_draws_from_the_callers_generator_is_not_kept():
    reuse, calls = Reuse(Kept(10**6)), []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)

        def sample(generator=generator):
            calls.append(1)
            return torch.randn(4, generator=generator)

        reuse.encode("pictures", sample, dict(generator=generator), None)
    assert len(calls) == 2 and len(reuse.kept) == 0


def test_a_pipeline_with_its_own_encoding_is_asked_each_time(make_pipe, edit):
    class Own(FluxKontextPipeline):
        def encode_prompt(self, *args, **kwargs):
            return super().encode_prompt(*args, **kwargs)

    pipe = specedit.install(make_pipe(Own), **REUSING)
    edit(pipe), edit(pipe)
    assert reused(pipe) == {"pictures": 1, "findings": 1}


@pytest.mark.thorough
def test_weights_that_cannot_be_watched_are_said_once(own, edit):
    with torch.inference_mode():
        own.vae.encoder.conv_in.weight.data = own.vae.encoder.conv_in.weight.data.clone()
        own.vae.encoder.conv_in = copy.deepcopy(own.vae.encoder.conv_in)
    specedit.install(own, **REUSING)
    with pytest.warns(UserWarning, match="reuse_encodings has no effect: changes of some weights cannot be seen"):
        edit(own)
    edit(own)
    assert reused(own) == {}


# ----------------------------------------------------------------------------------- offloading, threads, memory, stock


@pytest.mark.thorough
@pytest.mark.parametrize("offload", ["models", "modules"])
def test_offloaded_weights_are_the_same_weights(own, edit, offload):
    expected = edit(specedit.install(own, **QUICK))
    specedit.install(own, **REUSING)
    if offload == "models":
        own.enable_model_cpu_offload(device="cpu")
    else:
        from accelerate import cpu_offload

        for part in (own.transformer, own.vae):
            cpu_offload(part, torch.device("cpu"))
    first = edit(own)
    assert torch.equal(edit(own), first) and reused(own) == AGAIN
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_threads_share_what_is_kept(pipe, edit):
    embeds, pooled, _ = pipe.encode_prompt("make it red", None, max_sequence_length=16)
    given = dict(prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled, edit_mask=CORNER)
    specedit.install(pipe, **REUSING)
    first = edit(pipe, **given)
    with ThreadPoolExecutor(3) as pool:
        for images in pool.map(lambda _: edit(pipe, **given), range(3)):
            assert torch.equal(images, first)
        assert pool.submit(lambda: reused(pipe)).result() == {"pictures": 1}


def test_the_least_recently_used_goes_first():
    kept = Kept(most=3 * 16)
    for name in (b"a", b"b", b"c"):
        kept.put(name, (torch.full((4,), float(name[0])), None))
    kept.get(b"a")
    kept.put(b"d", torch.zeros(4))
    assert kept.get(b"b") is None and kept.get(b"a")[0][0] == ord("a") and kept.get(b"a")[1] is None
    assert len(kept) == 3 and kept.bytes == 48
    kept.put(b"e", torch.zeros(13))  # larger than all
    assert kept.get(b"e") is None and len(kept) == 3


@pytest.mark.thorough
def test_memory_ends_with_the_installation(pipe, edit):
    specedit.install(pipe, **REUSING)
    edit(pipe)
    kept = weakref.ref(installation_of(pipe).encodings.kept)
    assert kept().bytes > 0 and installation_of(copy.copy(pipe)).encodings.kept.bytes == 0
    specedit.install(pipe, **REUSING)  # which starts anew
    gc.collect()
    assert kept() is None
    edit(pipe)
    kept = weakref.ref(installation_of(pipe).encodings.kept)
    specedit.uninstall(pipe)
    gc.collect()
    assert kept() is None


def test_stock_calls_reuse_nothing(pipe, edit, count_calls):
    specedit.install(pipe, **REUSING)
    edit(pipe)
    calls = count_calls(*encoders(pipe))
    with specedit.disabled(pipe):
        edit(pipe, num_inference_steps=1)
    pipe.encode_prompt("make it red", None, max_sequence_length=16)
    assert len(calls) == 5


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_the_option_is_true_or_false(pipe, value):
    with pytest.raises(TypeError, match=f"^reuse_encodings: expected True or False, got {value!r}"):
        specedit.install(pipe, reuse_encodings=value)
    assert installation_of(pipe) is None
