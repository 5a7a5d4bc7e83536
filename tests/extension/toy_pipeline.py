"""An editing pipeline that this package does not know: layers without bias, no scheduler, a schedule of its own."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import nn


class ToyBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x, rotation, bias):
        q, k, v = self.qkv(F.rms_norm(x, x.shape[-1:])).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (
            torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * rotation).flatten(3) for t in (q, k)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(F.rms_norm(x, x.shape[-1:]))))


class ToyTransformer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, in_channels=16, num_layers=2, num_attention_heads=2, attention_head_dim=8):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.text, self.tokens = nn.Embedding(256, width), nn.Linear(in_channels, width, bias=False)
        self.time, self.kind = nn.Linear(1, width, bias=False), nn.Linear(1, width, bias=False)
        self.blocks = nn.ModuleList(ToyBlock(width, num_attention_heads) for _ in range(num_layers))
        self.velocity = nn.Linear(width, in_channels, bias=False)

    def forward(self, tokens, ids, places, sigma, bias=None):
        """Tokens (B, N, C), ids (B, T), places (N, 3): row, column, 1 for a reference; bias (1, T + N) of each key."""
        x = self.tokens(tokens) + self.kind(places[:, 2:])
        x = torch.cat([self.text(ids), x], 1) + self.time(sigma.view(1))
        frequencies = 0.3 ** torch.arange(self.config.attention_head_dim // 4, device=x.device)
        angles = F.pad((places[:, :2, None] * frequencies).flatten(1), (0, 0, ids.shape[1], 0))
        for block in self.blocks:
            x = block(x, torch.polar(torch.ones_like(angles), angles), bias)
        return self.velocity(x[:, ids.shape[1] :])


def places_of(positions, reference):
    """(N, 3): positions (N, 2) and which picture."""
    return F.pad(positions.float(), (0, 1), value=float(reference))


class ToyPipeline(DiffusionPipeline):
    """The output has the picture's size. A token is 2 x 2 latents, 16 x 16 pixels."""

    model_cpu_offload_seq = "transformer->vae"
    interrupt = False

    def __init__(self, transformer, vae):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=16)

    def begin(self, image, prompt, generator, latents):
        """Noise and reference (1, N, 16), height and width in tokens, ids (1, T)."""
        device = self._execution_device
        pixels = self.image_processor.preprocess(image).to(device)
        reference = F.pixel_unshuffle(self.vae.encode(pixels).latent_dist.mode(), 2)
        height, width = reference.shape[2:]
        reference = reference.flatten(2).transpose(1, 2)
        noise = randn_tensor(reference.shape, generator, device) if latents is None else latents
        return noise, reference, height, width, torch.tensor([list(prompt.encode())], device=device)

    def unpack(self, tokens, height, width):
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)

    @torch.no_grad()
    def __call__(
        self, image, prompt, num_inference_steps=4, generator=None, latents=None, output_type="pil", return_dict=True
    ):
        x, reference, height, width, ids = self.begin(image, prompt, generator, latents)
        grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(x.device)
        places = torch.cat([places_of(grid, 0), places_of(grid, 1)])
        sigmas = torch.linspace(1, 0, num_inference_steps + 1, device=x.device).square()
        for now, then in pairwise(sigmas):
            out = self.transformer(torch.cat([x, reference], 1), ids, places, now)
            x = x + (then - now) * out[:, : x.shape[1]]
        if output_type != "latent":
            x = self.image_processor.postprocess(self.vae.decode(self.unpack(x, height, width)).sample, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(x) if return_dict else (x,)
