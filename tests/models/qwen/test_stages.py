"""What the Qwen adapters do in every stage, and the images they return."""

import numpy as np
import pytest
import torch

import specedit
from specedit import SpecEditConfig
from specedit.method.adapter import Run
from tests.models.qwen.common import GUIDED, QUICK


def test_text_positions_match_those_of_a_picture_of_the_stages_size(edit):
    pipe = edit.make()
    offsets = []
    forward = pipe.transformer.forward

    def watch(**kwargs):
        offsets.append((kwargs["hidden_states"].shape[1], kwargs["img_shapes"].frequencies))
        return forward(**kwargs)

    pipe.transformer.forward = watch
    specedit.install(pipe, key_bias="none", attention="stock", **QUICK)
    edit.run(pipe, (160, 96))
    texts = [text for _, (_, text) in offsets]
    assert len(texts) == 6
    theirs = pipe.transformer.pos_embed.pos_freqs
    # 160 x 96 px beside a reference of 160 x 96: 3 rows in the draft, 5 where all is coarse, then 10. Half lie below 0.
    for text, begin in zip(texts, (1, 1, 2, 2, 5, 5), strict=True):
        assert torch.equal(text, theirs[begin : begin + len(text)])


def test_the_draft_may_see_a_smaller_picture(edit, picture):
    def vision_tokens(pipe):
        sizes = []
        encode = pipe.encode_prompt
        pipe.encode_prompt = lambda **kwargs: sizes.extend(x.size for x in kwargs["image"]) or encode(**kwargs)
        return sizes

    texts = []
    for condition in ("full", "small"):
        pipe = edit.make()
        sizes = vision_tokens(pipe)
        specedit.install(pipe, draft_condition=condition, **QUICK)
        edit.run(pipe, **GUIDED)
        report = specedit.report(pipe)
        texts.append([next(s.tokens for s in report.stages if s.name == name) for name in ("draft", "full")])
        assert sizes == [(128, 128)] * 2 + ([(32, 32)] * 2 if condition == "small" else [])
    assert texts[0][1] == texts[1][1]  # the main run keeps the full prompt
    assert texts[0][0] - texts[1][0] == 3  # four vision tokens became one


def test_embeddings_that_were_given_serve_the_draft_as_they_are(edit):
    pipe = edit.make()
    embeds = torch.randn(1, 7, 16)
    mask = torch.ones(1, 7, dtype=torch.long)
    adapter, state = edit.prepare(pipe, prompt=None, prompt_embeds=embeds, prompt_embeds_mask=mask)
    small = adapter.draft_state(Run(adapter, pipe, SpecEditConfig(draft_condition="small"), state))
    assert torch.equal(small.conditioning.prompt_embeds, embeds)


def test_features_are_what_the_decoder_computes(edit):
    pipe = edit.make()
    adapter, state = edit.prepare(pipe, (144, 112))
    decoder, seen, handles = pipe.vae.decoder, [], []
    for module in (decoder.conv_in, decoder.mid_block, decoder.up_blocks[0]):
        handles.append(module.register_forward_hook(lambda module, inputs, output: seen.append(output)))
    with torch.no_grad():
        adapter.decode(pipe, state, state.noise, "pt")
        expected = list(seen)
        got = adapter.features(pipe, state.noise, state.grid)
    for handle in handles:
        handle.remove()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b[:, :, 0])


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_images_are_the_stock_pipelines(edit, output_type):
    stock = edit.run(edit.make(), (160, 96), num_inference_steps=2, output_type=output_type)
    images = edit.run(specedit.install(edit.make(), steps=(0, 0, 2)), (160, 96), output_type=output_type)
    first, second = (torch.as_tensor(np.array(x[0]).astype(np.float32)) for x in (stock, images))
    assert first.shape == second.shape
    assert (first - second).abs().max() <= (1 if output_type == "pil" else 1e-3)


def test_keep_pixels_gives_back_the_input(edit, picture):
    pipe = specedit.install(edit.make(), keep_pixels=True, **QUICK)
    mask = np.zeros((128, 128), dtype=np.uint8)
    mask[:32, :32] = 1
    image = edit.run(pipe, edit_mask=mask, output_type="pil")[0]
    assert np.array_equal(np.asarray(image)[32:], np.asarray(picture())[32:])
    assert not np.array_equal(np.asarray(image)[:32, :32], np.asarray(picture())[:32, :32])
