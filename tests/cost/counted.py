"""The table of an autoencoder's halves beside its layers on the meta device."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from specedit.cost.roofline import AUTOENCODERS, autoencoder_ops


def assert_counted(model, half, vae, shapes, pixels):
    """Operations, elements and weights of half an autoencoder over so many latent pixels.

    shapes: of the picture that "encode" takes, and of the latents that the other halves take.
    """
    decoder, elements = vae.decoder, 0

    def features(z):
        return decoder.up_blocks[0](decoder.mid_block(decoder.conv_in(z)))

    def count(module, inputs, output):
        nonlocal elements
        elements += sum(x.numel() for x in inputs if isinstance(x, torch.Tensor)) + output.numel()

    hooks = [m.register_forward_hook(count) for m in vae.modules() if not list(m.children())]
    run = dict(encode=vae.encode, features=features, decode=vae.decode)[half]
    with torch.no_grad(), torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(torch.zeros(shapes[half != "encode"], dtype=vae.dtype))
    for hook in hooks:
        hook.remove()
    flops = sum(op.flops for op in autoencoder_ops(model, half, pixels))
    assert flops == pytest.approx(counter.get_total_flops(), rel=1e-3)
    cost = AUTOENCODERS[model][half]
    assert cost.elements * pixels == pytest.approx(elements, rel=1e-3)
    parts = dict(encode=[vae.encoder], decode=[decoder], features=[decoder.conv_in, decoder.mid_block])[half]
    parts = [*parts, decoder.up_blocks[0]] if half == "features" else parts
    assert cost.weights == pytest.approx(sum(p.numel() for part in parts for p in part.parameters()), rel=1e-3)
