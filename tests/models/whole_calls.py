"""What calls of any family have in common with the stock pipeline's, for tests of its own arguments."""

import numpy as np
import torch

import specedit

QUICK = dict(steps=(2, 1, 1), draft_steps=2)
CORNER = np.zeros((128, 128), dtype=np.uint8)
CORNER[:32, :32] = 1


def close(a, b, tolerance=2e-4):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_a_lora_acts_as_in_stock(family, folder):
    """Loaded by the pipeline's own loader, at full and at half scale; unloaded, nothing is left of it."""
    pipe = family.make()
    plain = family.run(pipe, num_inference_steps=2)
    specedit.install(pipe, steps=(0, 0, 2))
    pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    with specedit.disabled(pipe):
        stock, half = (
            family.run(pipe, num_inference_steps=2, attention_kwargs=kwargs) for kwargs in (None, {"scale": 0.5})
        )
    assert (stock - plain).abs().max() > 1e-2 and (half - stock).abs().max() > 1e-3
    close(family.run(pipe), stock, 1e-3)
    close(family.run(pipe, attention_kwargs={"scale": 0.5}), half, 1e-3)
    specedit.install(pipe, restore="reference", **QUICK)
    with_lora = family.run(pipe)
    pipe.unload_lora_weights()
    assert (family.run(pipe) - with_lora).abs().max() > 1e-3
    specedit.uninstall(pipe)
    assert torch.equal(family.run(pipe, num_inference_steps=2), plain)


def save_lora(peft, family, names, folder):
    """Random weights of a LoRA on the layers of these names."""
    pipe = family.make()
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False))
    pipe.save_lora_weights(folder, transformer_lora_layers=peft.get_peft_model_state_dict(pipe.transformer))
    return folder


def assert_images_come_as_stock_gives_them(family):
    for kind in ("pil", "np", "pt"):
        stock = family.run(family.make(), num_inference_steps=1, output_type=kind)
        ours = family.run(specedit.install(family.make(), steps=(0, 0, 1)), output_type=kind)
        assert type(ours) is type(stock)
        np.testing.assert_allclose(
            np.asarray(ours[0], float), np.asarray(stock[0], float), atol=1 if kind == "pil" else 1e-3
        )
