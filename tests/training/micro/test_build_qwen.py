"""An untrained Qwen editor: real classes, the promised sizes, and a directory that reads back."""

import json
import time

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLForConditionalGeneration

from specedit.micro import qwen, scenes
from specedit.micro.pipelines import PictureProcessor
from training.micro import build_qwen
from training.micro.family_qwen import FlatAutoencoder
from training.micro.train_vae import roundtrip


@pytest.fixture(scope="module")
def pipe():
    return build_qwen.qwen()


def test_parts(pipe):
    assert isinstance(pipe, QwenImageEditPipeline)
    assert type(pipe.transformer) is QwenImageTransformer2DModel and type(pipe.vae) is AutoencoderKLQwenImage
    assert type(pipe.text_encoder) is Qwen2_5_VLForConditionalGeneration
    config = pipe.transformer.config
    assert (config.in_channels, config.out_channels, config.attention_head_dim) == (64, 16, 64)
    assert tuple(2 * axis for axis in config.axes_dims_rope) == (16, 56, 56)  # of Qwen-Image's heads of 128
    assert 12e6 < sum(p.numel() for p in pipe.transformer.parameters()) < 16e6
    assert pipe.vae.config.z_dim == 16 and len(pipe.vae.config.dim_mult) == 4 and pipe.vae_scale_factor == 8
    schedule = pipe.scheduler.config
    assert (schedule.use_dynamic_shifting, schedule.max_shift, schedule.shift_terminal) == (True, 0.9, 0.02)


def test_system_prompt_has_as_many_tokens_as_the_pipeline_drops(pipe):
    system = pipe.prompt_template_encode.split("<|vision_start|>")[0]
    assert len(pipe.tokenizer(system).input_ids) == pipe.prompt_template_encode_start_idx


def test_words_are_whole_and_others_become_bytes(pipe):
    for text, count in (("remove the red circle", 4), ("make the diamond purple", 4), ("turn it", 2)):
        assert len(pipe.tokenizer(text).input_ids) == count
    assert max(len(pipe.tokenizer(scenes.describe(seed).prompt).input_ids) for seed in range(200)) <= 16
    assert pipe.tokenizer.decode(pipe.tokenizer("zebra é").input_ids) == "zebra é"


def test_the_text_stream_is_short(pipe):
    case = scenes.sample(3, 512)
    embeds, mask = pipe.encode_prompt(case.prompt, image=case.source)
    assert embeds.shape[1] <= 4 + 2 + 5 + len(pipe.tokenizer(case.prompt).input_ids) and embeds.shape[2] == 192


@pytest.mark.thorough
def test_autoencoder_starts_as_a_thumbnail(pipe):
    image = scenes.draw([scenes.describe(4)], 128, 128)[0] * 2 - 1
    flat = FlatAutoencoder(pipe.vae)
    with torch.no_grad():
        latent = flat.encode(image).latent_dist.mean
    mean_colour = torch.nn.functional.avg_pool2d(image, 8)
    together = torch.stack([latent[0, :3].flatten(), mean_colour[0].flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.98
    assert roundtrip(flat, "cpu", 128, 4) > 17


def test_taps_over_padded_frames_are_zero(pipe):
    convs = [m for m in pipe.vae.modules() if type(m).__name__ == "QwenImageCausalConv3d" and m.weight.shape[2] == 3]
    assert convs and all(not m.weight[:, :, :-1].any() for m in convs)


def test_one_head_of_every_block_attends_to_its_own_reference_token(pipe):
    from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

    model = pipe.transformer
    rotary, _ = model.pos_embed([[(1, 8, 8), (1, 8, 8)]], max_txt_seq_len=1, device=torch.device("cpu"))
    states = torch.randn(1, 128, 256, generator=torch.Generator().manual_seed(0))
    for block in (model.transformer_blocks[0], model.transformer_blocks[-1]):
        q, k = (
            apply_rotary_emb_qwen(norm(project(states).unflatten(-1, (4, 64))), rotary, use_real=False)
            for norm, project in ((block.attn.norm_q, block.attn.to_q), (block.attn.norm_k, block.attn.to_k))
        )
        weight = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 8).softmax(-1)[0]
        own = weight[:, :64, 64:].diagonal(dim1=1, dim2=2).mean(1)
        assert own[0] > 0.2 and own[0] > 10 * own[1:].max()


@pytest.mark.thorough
def test_saved_editor_is_small_and_reads_back_quickly(pipe, tmp_path):
    folder = tmp_path / "editor"
    rates = pipe.text_encoder.model.language_model.rotary_emb.inv_freq.clone()
    build_qwen.save(pipe, folder)
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 40e6
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "QwenImageEditPipeline"
    began = time.monotonic()
    again = qwen.read(folder, torch_dtype=torch.float32)
    assert time.monotonic() - began < 5
    processor = PictureProcessor.from_pretrained(folder / "processor")
    plain = QwenImageEditPipeline.from_pretrained(folder, torch_dtype=torch.float32, processor=processor)
    for other in (again, plain):
        for name in ("transformer", "vae", "text_encoder"):
            pairs = zip(getattr(pipe, name).parameters(), getattr(other, name).parameters(), strict=True)
            assert all(torch.equal(a.half().float(), b.float()) for a, b in pairs)
    assert type(again) is type(pipe) and type(plain) is QwenImageEditPipeline
    assert again.tokenizer("make it red").input_ids == pipe.tokenizer("make it red").input_ids
    assert pipe.transformer.dtype == torch.float32
    for one in (pipe, again):  # half precision would round them
        assert torch.equal(one.text_encoder.model.language_model.rotary_emb.inv_freq, rates)
