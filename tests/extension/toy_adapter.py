"""An adapter as somebody outside the package would write it."""

from dataclasses import dataclass

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from specedit.layout import TokenGrid
from specedit.method.adapter import Adapter, Conditioning, EditState, rows_index
from specedit.models.shared.images import decoder_features

from .toy_pipeline import ToyPipeline, places_of


@dataclass
class ToyConditioning(Conditioning):
    ids: torch.Tensor
    source: torch.Tensor


class ToyAdapter(Adapter):
    name, pipelines, calls = "toy", "ToyPipeline", (ToyPipeline,)

    @staticmethod
    def matches(pipe):
        return isinstance(pipe, ToyPipeline)

    def refusal(self, pipe, call, attention):
        return None

    def schedule_refusal(self, pipe):
        return None  # `sigmas` is the pipeline's schedule, whatever its components

    def sigmas(self, pipe, tokens, start, end, steps):
        return torch.linspace(start**0.5, end**0.5, steps + 1).square()

    def prepare(self, pipe, call, config):
        if config.rope != "scaled":
            raise ValueError(f"rope: expected 'scaled' for {self.name}, got {config.rope!r}")
        noise, reference, *size, ids = pipe.begin(call["image"], call["prompt"], call["generator"], call["latents"])
        source = pipe.image_processor.preprocess(call["image"]).to(noise.device) / 2 + 0.5
        return EditState(
            grid=TokenGrid(*size), noise=noise, reference=reference, reference_grid=TokenGrid(*size),
            generator=call["generator"], text_tokens=ids.shape[1], branches=1, pixels_per_token=16,
            backend={"auto": None, "stock": "torch"}.get(config.attention, config.attention),
            conditioning=ToyConditioning(ids, source),
        )  # fmt: skip

    def reference_offset(self, pipe, output, reference):
        return 0, 0

    def call_size(self, pipe, picture):
        return {}

    def predict(self, run, group, sigma, partial=None):
        ids = run.state.conditioning.ids
        sides = (*group.layout.layouts, *group.reference_layout.layouts)
        if not group.inputs:  # what every step of the stage takes alike
            group.inputs["places"] = torch.cat([places_of(side.positions, i > 0) for i, side in enumerate(sides)])
            areas = torch.cat([torch.ones(ids.shape[1], device=ids.device), *(side.area for side in sides)])
            biased = run.config.key_bias == "area" and group.layout.is_mixed
            group.inputs["bias"] = areas.log()[None] if biased else None
        tokens = torch.cat([group.tokens, group.reference], 1)
        sigma = torch.full((), sigma, device=tokens.device)
        ids = ids.expand(run.state.batch, -1)[rows_index(group.rows, ids.device)]
        out = run.pipe.transformer(tokens, ids, group.inputs["places"], sigma, group.inputs["bias"])
        return [out[:, : group.layout.tokens]]

    def guide(self, run, outputs):
        return outputs[0]

    def features(self, pipe, tokens, grid):
        return decoder_features(pipe.vae, pipe.unpack(tokens, *grid.shape))

    def decode(self, pipe, state, tokens, output_type):
        if output_type == "latent":
            return tokens
        images = pipe.vae.decode(pipe.unpack(tokens, *state.grid.shape)).sample
        return pipe.image_processor.postprocess(images, output_type)

    def output(self, images):
        return ImagePipelineOutput(images)

    def attach(self, pipe):
        pass  # positions and bias are arguments of the transformer

    def detach(self, pipe):
        pass
