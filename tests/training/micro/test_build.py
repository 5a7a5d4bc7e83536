"""An untrained Kontext editor: real classes, the promised sizes, and a directory that reads back."""

import pytest
import torch
from diffusers import AutoencoderKL, FluxKontextPipeline, FluxTransformer2DModel

from specedit.micro import kontext, scenes
from training.micro import build
from training.micro.family_kontext import ids
from training.micro.train_vae import roundtrip


@pytest.fixture(scope="module")
def pipe():
    return build.kontext()


def test_parts(pipe):
    assert type(pipe) is FluxKontextPipeline
    assert type(pipe.transformer) is FluxTransformer2DModel and type(pipe.vae) is AutoencoderKL
    config = pipe.transformer.config
    assert (config.in_channels, config.attention_head_dim, config.guidance_embeds) == (64, 64, True)
    assert sum(config.axes_dims_rope) == 64
    assert 8e6 < sum(p.numel() for p in pipe.transformer.parameters()) < 12e6
    assert len(pipe.vae.config.block_out_channels) == 4 and pipe.vae.config.latent_channels == 16
    assert pipe.vae_scale_factor == 8 and pipe.scheduler.config.use_dynamic_shifting


def test_every_prompt_fits_and_words_are_whole(pipe):
    for seed in range(200):
        ids = pipe.tokenizer_2(scenes.describe(seed).prompt).input_ids
        assert len(ids) <= kontext.TEXT_TOKENS
    assert len(pipe.tokenizer_2("remove the red circle").input_ids) <= 6


def test_unknown_words_become_bytes(pipe):
    ids = pipe.tokenizer_2("zebra é").input_ids
    assert pipe.tokenizer_2.unk_token_id not in ids
    assert pipe.tokenizer_2.decode(ids, skip_special_tokens=True).strip() == "zebra é"


def test_padding_is_capped(pipe):
    padded = pipe.tokenizer_2("remove", padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    assert padded.input_ids.shape == (1, kontext.TEXT_TOKENS)


def test_autoencoder_starts_as_a_thumbnail(pipe):
    image = scenes.draw([scenes.describe(4)], 128, 128)[0] * 2 - 1
    with torch.no_grad():
        latent = pipe.vae.encode(image).latent_dist.mean
    mean_colour = torch.nn.functional.avg_pool2d(image, 8)
    together = torch.stack([latent[0, :3].flatten(), mean_colour[0].flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.98
    assert roundtrip(pipe.vae, "cpu", 128, 4) > 17


def test_one_head_of_every_block_attends_to_its_own_reference_token(pipe):
    from diffusers.models.embeddings import apply_rotary_emb

    model = pipe.transformer
    rotary = model.pos_embed(torch.cat([ids((8, 8), 0, "cpu"), ids((8, 8), 1, "cpu")]))
    states = torch.randn(1, 128, 256, generator=torch.Generator().manual_seed(0))
    for block in (model.transformer_blocks[0], model.single_transformer_blocks[-1]):
        q, k = (
            apply_rotary_emb(norm(project(states).unflatten(-1, (4, 64))), rotary, sequence_dim=1)
            for norm, project in ((block.attn.norm_q, block.attn.to_q), (block.attn.norm_k, block.attn.to_k))
        )
        weight = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 8).softmax(-1)[0]
        own = weight[:, :64, 64:].diagonal(dim1=1, dim2=2).mean(1)
        assert own[0] > 0.2 and own[0] > 10 * own[1:].max()


@pytest.mark.thorough
def test_saved_editor_reads_back(pipe, tmp_path):
    build.save(pipe, tmp_path / "editor")
    again = kontext.read(tmp_path / "editor", torch_dtype=torch.float32)
    plain = FluxKontextPipeline.from_pretrained(tmp_path / "editor", torch_dtype=torch.float32, local_files_only=True)
    for other in (again, plain):
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            pairs = zip(getattr(pipe, name).parameters(), getattr(other, name).parameters(), strict=True)
            assert all(torch.equal(a.half().float(), b.float()) for a, b in pairs)
    assert again.tokenizer_2("make it red").input_ids == pipe.tokenizer_2("make it red").input_ids
    assert pipe.transformer.dtype == torch.float32
    build.save(again, tmp_path / "copy")  # of an editor that was read from a directory
    for file in (tmp_path / "copy").rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file
