"""Fixtures: tiny Qwen-Image-Edit and LongCat-Image-Edit pipelines, made in memory."""

import importlib
import inspect
import re

import pytest
import torch

from tests.copies import copies_of, copying

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip


class StandInProcessor:
    """Does what Qwen2VLProcessor does for pictures and text, without its video part (which needs torchvision)."""

    def __init__(self, image_processor, tokenizer):
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, text, images=None, padding=True, return_tensors="pt"):
        from transformers import BatchFeature

        data = {}
        if images is not None:
            data = dict(
                self.image_processor(images=images if isinstance(images, list) else [images], return_tensors="pt")
            )
            sizes = iter((data["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist())
            pad = "<|image_pad|>"
            text = [re.sub(re.escape(pad), lambda _: pad * next(sizes), one) for one in text]
        return BatchFeature({**self.tokenizer(text, padding=padding, return_tensors="pt"), **data})


@pytest.fixture(scope="session")
def qwen_components():
    """Random weights, 4 latent channels, 16 px a token, a byte tokenizer, at most 4 vision tokens a picture."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    try:
        from transformers import Qwen2VLImageProcessorPil as ImageProcessor
    except ImportError:
        from transformers import Qwen2VLImageProcessor as ImageProcessor

    def seeded(make):
        torch.manual_seed(0)
        return make().eval()

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(s, special=True) for s in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="right"
    )
    number = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=len(tokenizer), bos_token_id=number("<|im_start|>"), eos_token_id=number("<|im_end|>"),
            rope_theta=1e6, rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        ),
        vision_config=dict(
            depth=2, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16, patch_size=14,
            spatial_merge_size=2,
        ),
        image_token_id=number("<|image_pad|>"), video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"), vision_end_token_id=number("<|vision_end|>"),
        vocab_size=len(tokenizer), hidden_size=16,
    )  # fmt: skip

    def transformer(**options):
        model = seeded(
            lambda: QwenImageTransformer2DModel(
                in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
                joint_attention_dim=16, axes_dims_rope=(8, 4, 4), **options,
            )
        )  # fmt: skip
        with torch.no_grad():  # as initialised its blocks hardly matter; larger weights make every mistake visible
            for parameter in model.parameters():
                parameter.mul_(1.5)
        return model

    def autoencoder():
        return AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.0, 0.3], latents_std=[1.0, 1.5, 0.8, 2.0],
        )  # fmt: skip

    return dict(
        vae=seeded(autoencoder),
        text_encoder=seeded(lambda: Qwen2_5_VLForConditionalGeneration(config)),
        tokenizer=tokenizer,
        processor=StandInProcessor(
            ImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56, patch_size=14, merge_size=2), tokenizer
        ),
        transformer=copying(transformer),
    )


@pytest.fixture(scope="session")
def qwen_copies(qwen_components):
    """Makers of copies of the parts that every pipeline has for itself."""
    return copies_of({name: part for name, part in qwen_components.items() if name != "transformer"})


@pytest.fixture
def make_qwen(qwen_components, qwen_copies, monkeypatch):
    """Makes pipelines of one class with equal weights and nothing in common; pictures become 128 px, not 1 MP."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPipeline, QwenImageTransformer2DModel
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    stock = edit.calculate_dimensions
    inpaint = importlib.import_module("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_inpaint")
    for module in (edit, inpaint):
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: stock(128 * 128, ratio))
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", 128 * 128)
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", 64 * 64)
    # Without this the output of the Plus pipeline would be 1 MP where a call names no size.
    plus_stock = plus.calculate_dimensions
    monkeypatch.setattr(plus, "calculate_dimensions", lambda area, ratio: plus_stock(min(area, 128 * 128), ratio))

    def make(cls=QwenImageEditPipeline, scheduler=None, **options):
        options = {name: value for name, value in options.items() if value}
        for name in options.keys() - inspect.signature(QwenImageTransformer2DModel).parameters.keys():
            pytest.skip(f"this diffusers has no {name}")
        torch.manual_seed(0)  # for what the test draws
        parts = {name: copies() for name, copies in qwen_copies.items()}
        scheduler = scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        pipe = cls(scheduler=scheduler, transformer=qwen_components["transformer"](**options), **parts)
        pipe.set_progress_bar_config(disable=True)
        image = "" if cls.__name__.endswith("PlusPipeline") else "<|vision_start|><|image_pad|><|vision_end|>"
        pipe.prompt_template_encode = image + "{}<|im_end|>"  # the real one is 350 bytes
        pipe.prompt_template_encode_start_idx = 0
        return pipe

    return make


@pytest.fixture(scope="session")
def longcat_copies():
    """Makers of copies of FLUX's parts, with 16 latent channels."""
    from diffusers import AutoencoderKL, LongCatImageTransformer2DModel

    torch.manual_seed(0)
    transformer = LongCatImageTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8],
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(1.5)
    vae = AutoencoderKL(
        sample_size=32, block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=16, norm_num_groups=1,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035,
    ).eval()  # fmt: skip
    return copies_of(dict(transformer=transformer, vae=vae))


@pytest.fixture
def make_longcat(longcat_copies, qwen_copies, monkeypatch):
    """Makes LongCatImageEditPipelines: FLUX's parts with 16 latent channels, and the encoder of `qwen_components`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImageEditPipeline
    from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as edit

    def dimensions(area, ratio):
        width = (128 * 128 * ratio) ** 0.5
        return round(width / 16) * 16, round(width / ratio / 16) * 16

    monkeypatch.setattr(edit, "calculate_dimensions", dimensions)

    def make():
        torch.manual_seed(0)  # for what the test draws
        pipe = LongCatImageEditPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            text_processor=qwen_copies["processor"](),
            **{name: qwen_copies[name]() for name in ("text_encoder", "tokenizer")},
            **{name: copies() for name, copies in longcat_copies.items()},
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.prompt_template_encode_prefix = "<|vision_start|><|image_pad|><|vision_end|>"
        pipe.prompt_template_encode_suffix = "<|im_end|>"
        pipe.tokenizer_max_length = 16
        return pipe

    return make
