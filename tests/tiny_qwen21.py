"""Fixtures: tiny Qwen-Image-2.1 pipelines, made in memory."""

import re

import pytest
import torch

from tests.copies import copies_of, copying

PAD = "<|image_pad|>"


class StandInQwen3Processor:
    """Does what Qwen3VLProcessor does for pictures and text, without its video part (which needs torchvision)."""

    def __init__(self, image_processor, tokenizer):
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def apply_chat_template(self, conversation, tokenize=True, return_dict=False):
        texts = [f"<|im_start|>{m['role']}\n{m['content'][0]['text']}<|im_end|>\n" for m in conversation]
        return self.tokenizer(texts)["input_ids"]

    def __call__(self, text, images=None, padding=True, padding_side="left", return_tensors="pt"):
        from transformers import BatchFeature

        data = {}
        if images is not None:
            data = dict(self.image_processor(images=images, return_tensors="pt"))
            sizes = iter((data["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist())
            text = [re.sub(re.escape(PAD), lambda _: PAD * next(sizes), one) for one in text]
        words = self.tokenizer(text, padding=padding, padding_side=padding_side, return_tensors="pt")
        kinds = (words["input_ids"] == self.tokenizer.convert_tokens_to_ids(PAD)).int()
        return BatchFeature({**words, **data, "mm_token_type_ids": kinds})


@pytest.fixture(scope="session")
def qwen21_components(qwen_components):
    """Makers of copies. Random weights, 4 latent channels, 16 px a token, bytes as words, a vision token for 2 x 2."""
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "QwenImage21Pipeline"):
        pytest.skip("this diffusers has no Qwen-Image-2.1")
    from diffusers import AutoencoderKLQwenImage21, QwenImage21Transformer2DModel
    from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    def seeded(make):
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)

    def transformer(**options):
        model = seeded(
            lambda: QwenImage21Transformer2DModel(
                in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
                context_in_dim=16, axes_dims_rope=(4, 6, 6), **options,
            )
        )  # fmt: skip
        for parameter in model.parameters():  # as initialised its blocks hardly matter
            parameter.mul_(1.5)
        return model

    tokenizer = qwen_components["tokenizer"]
    number = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            head_dim=8, vocab_size=len(tokenizer),
            rope_parameters={"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1e6},
        ),
        vision_config=dict(
            depth=2, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        ),
        image_token_id=number(PAD), video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"), vision_end_token_id=number("<|vision_end|>"),
    )  # fmt: skip
    vae = seeded(
        lambda: AutoencoderKLQwenImage21(
            base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.0, 1.5, 0.8, 2.0],
        )
    )  # fmt: skip
    pictures = Qwen2VLImageProcessorPil(min_pixels=32 * 32, max_pixels=2048 * 2048, patch_size=16, merge_size=2)
    parts = dict(
        vae=vae, text_encoder=seeded(lambda: Qwen3VLForConditionalGeneration(config)),
        processor=StandInQwen3Processor(pictures, tokenizer),
    )  # fmt: skip
    return copies_of(parts) | dict(transformer=copying(transformer))


@pytest.fixture
def make_qwen21(qwen21_components):
    """Makes pipelines with equal weights and nothing in common. options: the transformer's."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImage21Pipeline

    def make(scheduler=None, sample_sigmas=None, **options):
        torch.manual_seed(0)  # for what the test draws
        parts = {name: qwen21_components[name]() for name in ("vae", "text_encoder", "processor")}
        pipe = QwenImage21Pipeline(
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            transformer=qwen21_components["transformer"](**options), sample_sigmas=sample_sigmas, **parts,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        # The real ones are 200 bytes, of which the first message is dropped.
        start = "<image1><|vision_start|><|image_pad|><|vision_end|>"
        pipe.prompt_template_t2i, pipe.prompt_template_ti2i, pipe._drop_idx = (
            "{}<|im_end|>",
            f"{start}{{}}<|im_end|>",
            0,
        )
        return pipe

    return make
