"""Fixtures: tiny FLUX.2 pipelines, made in memory."""

import copy

import pytest
import torch

from tests.copies import copies_of, copying

LAYERS = (1, 2)  # of the text encoder, whose states are the prompt's embeddings
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class StandInChatProcessor:
    """Does what PixtralProcessor does for text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def apply_chat_template(self, conversations, tokenize=True, return_dict=True, add_generation_prompt=False, **how):
        texts = [
            "".join(part["text"] for message in messages for part in message["content"]) for messages in conversations
        ]
        return self.tokenizer(texts, **how)


@pytest.fixture(scope="session")
def flux2_components(qwen_components):
    """Makers of copies. Random weights, 16 px a token, 4 latent channels; their statistics differ within a token."""
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "Flux2Pipeline"):
        pytest.skip("this diffusers has no FLUX.2")
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

    def seeded(make):
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)

    def transformer(**options):
        model = seeded(
            lambda: Flux2Transformer2DModel(
                in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), **options,
            )
        )  # fmt: skip
        for parameter in model.parameters():  # as initialised its blocks hardly matter
            parameter.mul_(1.5)
        return model

    def autoencoder():
        vae = AutoencoderKLFlux2(
            sample_size=32, block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=1,
        )  # fmt: skip
        draw = torch.Generator().manual_seed(1)
        vae.bn.running_mean.copy_(0.3 * torch.randn(16, generator=draw))
        vae.bn.running_var.copy_(0.5 + torch.rand(16, generator=draw))
        return vae

    tokenizer = copy.deepcopy(qwen_components["tokenizer"])
    tokenizer.chat_template = CHAT
    sizes = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, vocab_size=len(tokenizer),
    )  # fmt: skip
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    mistral = Mistral3Config(
        text_config=dict(model_type="mistral", **sizes), vision_config=dict(model_type="pixtral", **vision)
    )
    parts = dict(
        vae=seeded(autoencoder), tokenizer=tokenizer,
        qwen3=seeded(lambda: Qwen3ForCausalLM(Qwen3Config(**sizes))),
        mistral=seeded(lambda: Mistral3ForConditionalGeneration(mistral)),
    )  # fmt: skip
    return copies_of(parts) | dict(transformer=copying(transformer))


@pytest.fixture
def make_flux2(flux2_components):
    """Makes pipelines of one class, by its name, with equal weights and nothing in common."""
    import diffusers
    from diffusers import FlowMatchEulerDiscreteScheduler

    def make(name="Flux2KleinPipeline", scheduler=None, **options):
        if not hasattr(diffusers, name):
            pytest.skip(f"this diffusers has no {name}")
        torch.manual_seed(0)  # for what the test draws
        dev = name == "Flux2Pipeline"
        tokenizer = flux2_components["tokenizer"]()
        pipe = getattr(diffusers, name)(
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=flux2_components["vae"](),
            text_encoder=flux2_components["mistral" if dev else "qwen3"](),
            tokenizer=StandInChatProcessor(tokenizer) if dev else tokenizer,
            transformer=flux2_components["transformer"](**({} if dev else dict(guidance_embeds=False))), **options,
        )  # fmt: skip
        if dev:
            pipe.system_message = ""  # the real one is longer than the tests' prompts
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make
