"""Builds an untrained Kontext editor: the architecture of FLUX.1-Kontext with small widths.

Every part is the real class of diffusers or transformers; only the configurations are our own.
"""

import json
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from diffusers.models.resnet import ResnetBlock2D
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from specedit.micro.kontext import TEXT_TOKENS, CappedTokenizer
from specedit.micro.vocabulary import BACKGROUNDS, COLOURS, PHRASES, PLACES, SHAPES, SIZES

from .saving import strip_name_or_path, write_transformers4_config

T5_LAYERS = 3
BLOCKS = 2, 5  # of the transformer: double-stream and single-stream
NEIGHBOUR_LOGIT = 8.0  # bias on a neighbour's logit: the neighbour then gets nearly all of the attention


def sentences() -> list[str]:
    """What the tokenizers are trained on: every phrasing, and the vocabulary's words."""
    words = [*COLOURS, *SHAPES, *PLACES, *SIZES, *BACKGROUNDS.values()]
    return [p for group in PHRASES.values() for p in group] + words * 4


def _tokenizer(special: dict[str, str], template: str, length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: a word of the vocabulary is one or two tokens, other text falls back to bytes."""
    names = list(special.values())
    tokenizer = Tokenizer(models.BPE(unk_token=special.get("unk_token")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=names, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, tokenizer.token_to_id(t)) for t in names if t in template]
    )
    # transformers 4 ignores the tokenizer's own add_prefix_space
    return CappedTokenizer(tokenizer_object=tokenizer, model_max_length=length, add_prefix_space=True, **special)


def text_parts() -> tuple[CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel, PreTrainedTokenizerFast]:
    """Small CLIP and T5 encoders with tokenizers trained on the phrasings, all in memory."""
    clip_tokenizer = _tokenizer(
        {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"},
        "<|startoftext|> $A <|endoftext|>",
        TEXT_TOKENS,
    )
    t5_tokenizer = _tokenizer({"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, "$A </s>", TEXT_TOKENS)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            projection_dim=128,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=192,
            d_kv=48,
            d_ff=384,
            num_layers=T5_LAYERS,
            num_heads=4,
            dropout_rate=0.0,
            is_encoder_decoder=False,
            pad_token_id=t5_tokenizer.pad_token_id,
            eos_token_id=t5_tokenizer.eos_token_id,
        )
    )
    attend_to_neighbours(t5)
    return clip, clip_tokenizer, t5, t5_tokenizer


@torch.no_grad()
def attend_to_neighbours(encoder: T5EncoderModel) -> None:
    """Initialise two heads of the last block to attend to the next and to the previous token, in place.

    All blocks share the relative bias that is changed. Blocks whose logits are in the hundreds hardly notice.
    """
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # (buckets, heads)
    attention = encoder.encoder.block[-1].layer[0].SelfAttention
    size = attention.key_value_proj_dim
    for head, distance in enumerate((1, -1)):
        bucket = attention._relative_position_bucket(torch.tensor(distance), num_buckets=len(bias))
        bias[bucket, head] += NEIGHBOUR_LOGIT
        attention.q.weight[head * size : (head + 1) * size] = 0


def autoencoder() -> AutoencoderKL:
    """8x down, 16 latent channels, four levels: FLUX's autoencoder without its mid-block attention."""
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=512,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    start_as_thumbnail(model)
    return model


@torch.no_grad()
def start_as_thumbnail(vae: AutoencoderKL) -> None:
    """Initialise latents 0-2 as the mean colour of 8 x 8 px, and the decoder as interpolation of them, in place.

    Training then has only detail to learn. Residual branches start at zero, so that the path is linear except for the
    last norm and SiLU of each half. Those become linear by two constant channels +-K in each signal's group: they fix
    the group's scale, and their sum recovers the group's mean. An offset of 6 keeps SiLU on its linear part.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
            if module.conv_shortcut is not None:
                _route(module.conv_shortcut, {c: c for c in range(3)})
    centre, area = torch.zeros(3, 3), torch.zeros(3, 3)
    centre[1, 1] = 1.0
    area[:2, :2] = 0.25  # the encoder pads right and below
    smooth = torch.outer(*[torch.tensor([1.0, 2.0, 1.0]) / 4] * 2)
    _route(vae.encoder.conv_in, {c: c for c in range(3)}, centre)
    _route(vae.decoder.conv_in, {c: c for c in range(3)}, centre)
    for block in vae.encoder.down_blocks[:-1]:
        _route(block.downsamplers[0].conv, {c: c for c in range(3)}, area)
    for block in vae.decoder.up_blocks[:-1]:
        _route(block.upsamplers[0].conv, {c: c for c in range(3)}, smooth)
    last = vae.encoder.down_blocks[-1].resnets[0].conv_shortcut
    _straighten(vae.encoder, last, vae.encoder.mid_block.resnets[-1].conv2, centre)
    last = vae.decoder.up_blocks[-1].resnets[0].conv_shortcut
    _straighten(vae.decoder, last, vae.decoder.up_blocks[-1].resnets[-1].conv2, centre)
    latents = vae.config.latent_channels
    vae.encoder.conv_out.weight[latents:] = 0
    vae.encoder.conv_out.bias[latents:] = -6  # log-variance: little noise at first


def _route(conv: torch.nn.Conv2d, channels: dict[int, int], kernel: torch.Tensor | None = None) -> None:
    """Make output channel `value` the convolution of input channel `key` alone with `kernel`."""
    for source, target in channels.items():
        conv.weight[target] = 0
        conv.weight[target, source] = 1.0 if kernel is None else kernel
        conv.bias[target] = 0


def _straighten(half: torch.nn.Module, shortcut, constants, centre: torch.Tensor, k: float = 4.0) -> None:
    """Make norm, SiLU and conv_out of one half pass three signals: channel 0 of the first three groups."""
    norm = half.conv_norm_out
    width = norm.num_channels // norm.num_groups
    _route(shortcut, {c: c * width for c in range(3)})
    pairs = max(1, width // 4)  # enough to make a group's standard deviation nearly independent of the image
    spread = k * math.sqrt(2 * pairs / width)
    for c in range(3):
        first = c * width
        norm.weight[first], norm.bias[first] = 2 * spread, 6.0
        half.conv_out.weight[c] = 0
        half.conv_out.weight[c, first] = centre / 2
        half.conv_out.bias[c] = -3.0 + 6 * spread
        for i in range(pairs):
            for sign, channel in ((k, first + 1 + 2 * i), (-k, first + 2 + 2 * i)):
                constants.bias[channel] = sign
                shortcut.weight[channel] = 0
                shortcut.bias[channel] = 0
                norm.weight[channel], norm.bias[channel] = 1.0, 6.0
                half.conv_out.weight[c, channel] = -centre * spread / (2 * pairs)


def transformer() -> FluxTransformer2DModel:
    """FLUX's transformer: 2 double and 5 single blocks of 4 heads of 64; axes as the real one's, halved."""
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=BLOCKS[0],
        num_single_layers=BLOCKS[1],
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=192,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )
    initialise(model)
    return model


@torch.no_grad()
def initialise(model: FluxTransformer2DModel) -> None:
    """adaLN-Zero, and in each block one head that attends to its own reference token, in place."""
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    norms = [getattr(block, name, None) for block in blocks for name in ("norm1", "norm1_context", "norm")]
    zero_modulation([norm.linear for norm in norms if norm is not None])
    zero_modulation([model.norm_out.linear, model.proj_out])
    attend_to_own_reference([b.attn for b in blocks], model.config.axes_dims_rope, model.config.attention_head_dim)


@torch.no_grad()
def zero_modulation(linears: list[torch.nn.Linear]) -> None:
    """adaLN-Zero (Peebles and Xie 2023): every block starts as the identity."""
    for linear in linears:
        linear.weight.zero_()
        linear.bias.zero_()


@torch.no_grad()
def attend_to_own_reference(attentions: list[torch.nn.Module], axes: tuple[int, int, int], head: int) -> None:
    """Initialise the first head (`head` channels) of each block to attend to its own reference token, in place.

    With constant q and k the rotary logit is sum_f w_f cos(theta_f * offset), which peaks at offset zero. Rotating k by
    one step along axis 0 moves that peak to the reference (id 1). Everything stays trainable; the initialisation
    saves training the search for the copy mechanism.
    """
    # The fastest rotary pairs resolve single tokens; two slower ones of each spatial axis resolve their periods.
    pairs = [0, *(axes[0] // 2 + i for i in range(3)), *((axes[0] + axes[1]) // 2 + i for i in range(3))]
    query, key = torch.zeros(head), torch.zeros(head)
    for pair in pairs:
        query[2 * pair] = key[2 * pair] = 1.0
    key[0], key[1] = math.cos(-1.0), math.sin(-1.0)  # theta_0 = 1: rotation by id 1 aligns it with the query
    strong = query.repeat_interleave(1).clone()
    strong[1::2] = strong[::2]
    for attention in attentions:
        for norm in (attention.norm_q, attention.norm_k):
            norm.weight.copy_(1 + strong * 0.7)
        for linear, constant in ((attention.to_q, query), (attention.to_k, key)):
            linear.weight[:head] *= 0.1
            linear.bias[:head] = constant


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX's flow-match scheduler with its resolution-dependent shift."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def kontext(seed: int = 0) -> FluxKontextPipeline:
    """An untrained editor."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip, clip_tokenizer, t5, t5_tokenizer = text_parts()
        parts = dict(
            scheduler=scheduler(),
            vae=autoencoder(),
            text_encoder=clip,
            tokenizer=clip_tokenizer,
            text_encoder_2=t5,
            tokenizer_2=t5_tokenizer,
            transformer=transformer(),
        )
    pipe = FluxKontextPipeline(**parts)
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.transformer):
        part.eval().requires_grad_(False)
    return pipe


def save(pipe: FluxKontextPipeline, folder: Path) -> None:
    """Write an editor in half precision."""
    dtype = pipe.transformer.dtype
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(folder, safe_serialization=True)
    pipe.to(dtype=dtype)
    index = folder / "model_index.json"  # CappedTokenizer is not in transformers; its parent is
    parts = json.loads(index.read_text())
    for name in ("tokenizer", "tokenizer_2"):
        parts[name] = ["transformers", "PreTrainedTokenizerFast"]
    index.write_text(json.dumps(parts, indent=2) + "\n")
    strip_name_or_path(folder)
    write_transformers4_config(folder)
