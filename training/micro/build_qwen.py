"""Builds an untrained Qwen editor: the architecture of Qwen-Image-Edit with small widths.

Every part is the real class of diffusers or transformers, except the two of `specedit.micro.pipelines`.
"""

import copy
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageCausalConv3d,
    QwenImageResample,
    QwenImageResidualBlock,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from specedit.micro.pipelines import OwnSizeQwenImageEditPipeline, PictureProcessor, Qwen2VLImageProcessor

from .build import attend_to_own_reference, sentences, zero_modulation
from .saving import strip_name_or_path, write_transformers4_config

WIDTH = 192  # of the text model
BLOCKS = 6  # of the transformer
HEADS = 4  # of 64 channels: the transformer is as wide as the Kontext editor's
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# Qwen2's pre-tokenizer. It splits the system prompt into 64 words, as many tokens as the pipeline drops from the
# prompt's embeddings.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SYSTEM = (
    "system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), then "
    "explain how the user's text instruction should alter or modify the image. Generate a new image that meets the "
    "user's requirements while maintaining consistency with the original input where appropriate.",
    "user\n", "assistant\n",
)  # fmt: skip
# The encoder sees images at about 56 x 56 px, 4 tokens. It is there for the words; the transformer sees the image.
VISION_PIXELS = 4 * 28 * 28


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen2's splits: words of the scenes and the system prompt are one token, others bytes."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    words.decoder = decoders.ByteLevel()
    known = sentences()
    spaced = [f" {text}" for text in known]  # only the first word of a prompt has no space before it
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    words.train_from_iterator([*known, *spaced, *SYSTEM], trainer)
    words.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="right",
        model_max_length=1024,
    )  # fmt: skip


def text_parts() -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerFast, PictureProcessor]:
    """A small vision-language model with its tokenizer and processor, all in memory."""
    words = tokenizer()
    number = words.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(
            hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=len(words), max_position_embeddings=1024, rope_theta=1e6,
            rope_scaling={"mrope_section": [6, 9, 9], "rope_type": "default", "type": "default"},
            bos_token_id=number("<|im_start|>"), eos_token_id=number("<|im_end|>"), tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=1, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=WIDTH, patch_size=14,
            spatial_merge_size=2, fullatt_block_indexes=[0],
        ),
        image_token_id=number("<|image_pad|>"), video_token_id=number("<|video_pad|>"),
        # After this token transformers 4 numbers image tokens by row and column; transformers 5 needs
        # `mm_token_type_ids` for it, which the pipeline does not pass. With -1 both number them in line with the words.
        vision_start_token_id=-1, vision_end_token_id=number("<|vision_end|>"),
        vocab_size=len(words), hidden_size=WIDTH, tie_word_embeddings=True,
    )  # fmt: skip
    look = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=VISION_PIXELS, patch_size=14, merge_size=2)
    return Qwen2_5_VLForConditionalGeneration(config), words, PictureProcessor(look, words)


def autoencoder() -> AutoencoderKLQwenImage:
    """8x down, 16 latent channels, four levels. It has single frames only, so no level downsamples time."""
    model = AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, False, False],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )
    start_as_thumbnail(model)
    return model


@torch.no_grad()
def start_as_thumbnail(vae: AutoencoderKLQwenImage, k: float = 6.0) -> None:
    """Initialise latents 0-2 as the mean colour of 8 x 8 px, and the decoder as interpolation of them, in place.

    As in the Kontext editor's autoencoder, residual branches start at zero and the last norm and SiLU of each half are
    made linear. Here each signal is paired with its negative, since silu(x) - silu(-x) = x, and two constant channels
    `k` fix the root mean square that the norm divides by.
    """
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.weight[:, :, :-1] = 0  # these taps see zero-padded frames only and get no gradient
        if isinstance(module, QwenImageResidualBlock):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
            if not isinstance(module.conv_shortcut, nn.Identity):
                _route(module.conv_shortcut, {c: c for c in range(8)})
        if isinstance(module, QwenImageAttentionBlock):
            module.proj.weight.zero_()
            module.proj.bias.zero_()
        if isinstance(module, QwenImageResample) and module.mode != "none":
            area = torch.zeros(3, 3)
            area[:2, :2] = 0.25  # padded right and below
            smooth = torch.outer(*[torch.tensor([1.0, 2.0, 1.0]) / 4] * 2)
            conv = module.resample[1]
            _route(conv, {c: c for c in range(6)}, smooth if module.mode.startswith("up") else area)
            _constant(conv, k)
    centre = torch.zeros(3, 3)
    centre[1, 1] = 1.0
    for half in (vae.encoder, vae.decoder):
        _route(half.conv_in, {c: c for c in range(3)}, centre)
        _route(half.conv_in, {c + 3: c for c in range(3)}, -centre)
        _constant(half.conv_in, k)
        dim = len(half.norm_out.gamma)
        half.norm_out.gamma[:6] = k * math.sqrt(2 / dim)
        rows = half.conv_out.weight
        for c in range(3):
            rows[c] = 0
            rows[c, c, -1], rows[c, c + 3, -1] = centre, -centre
            half.conv_out.bias[c] = 0
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(len(conv.weight))[:, :, None, None, None])
        conv.bias.zero_()
    vae.quant_conv.weight[vae.config.z_dim :] = 0
    vae.quant_conv.bias[vae.config.z_dim :] = -6  # log-variance: little noise at first


def _route(conv: nn.Module, channels: dict[int, int], kernel: torch.Tensor | None = None) -> None:
    """Make output channel `key` the convolution of input channel `value` alone with `kernel`."""
    for target, source in channels.items():
        conv.weight[target] = 0
        conv.bias[target] = 0
        here = conv.weight[target, source]
        here = here[-1] if here.ndim == 3 else here  # the last tap in time is the current frame's
        here.copy_(torch.ones_like(here) if kernel is None else kernel)


def _constant(conv: nn.Module, k: float) -> None:
    """Make output channels 6 and 7 the constant `k`."""
    conv.weight[6:8] = 0
    conv.bias[6:8] = k


def transformer() -> QwenImageTransformer2DModel:
    """Qwen-Image's transformer: 6 blocks of 4 heads of 64; axes as the real one's, halved.

    A block has 36 d^2 weights, of which an image token meets 12 d^2: these 15 M cost a token less than the other
    editor's 10 M. The width is that editor's, so that its blocks can be taken over (`inherit`).
    """
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=BLOCKS,
        attention_head_dim=64,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 28, 28),
    )
    zero_modulation([b.img_mod[1] for b in model.transformer_blocks])
    zero_modulation([b.txt_mod[1] for b in model.transformer_blocks])
    zero_modulation([model.norm_out.linear, model.proj_out])
    attend_to_own_reference([b.attn for b in model.transformer_blocks], model.config.axes_dims_rope, 64)
    return model


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image's flow-match scheduler."""
    return FlowMatchEulerDiscreteScheduler(
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def qwen(seed: int = 0) -> OwnSizeQwenImageEditPipeline:
    """An untrained editor."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder, words, processor = text_parts()
        parts = dict(vae=autoencoder(), text_encoder=encoder, transformer=transformer())
    for part in parts.values():
        part.eval().requires_grad_(False)
    return OwnSizeQwenImageEditPipeline(scheduler=scheduler(), tokenizer=words, processor=processor, **parts)


def save(pipe: OwnSizeQwenImageEditPipeline, folder: Path) -> None:
    """Write an editor in half precision."""
    parts = dict(pipe.components)
    for name, part in parts.items():
        if isinstance(part, nn.Module):  # a copy, since half precision would round the rotary frequencies
            parts[name] = copy.deepcopy(part).half()
    type(pipe)(**parts).save_pretrained(folder, safe_serialization=True)
    strip_name_or_path(Path(folder))
    write_transformers4_config(Path(folder))
