"""Training whose steps are small: for tests of what its parts do with an editor, and not of how well it learns."""

from functools import partial

import torch


def shrink(monkeypatch, tasks=8):
    """`tasks` at 64 px and prompts a step, 4 crops of 32 px for the autoencoder, initial fits to few prompts.

    Muon skips its Newton-Schulz iterations, bfloat16 products that many CPUs compute slowly. Its steps are then not
    orthogonal.
    """
    from training.micro import inherit_places, landmarks, neighbour_block, train_editor, train_text, train_vae

    images, roundtrip = train_vae.vae_images, train_vae.roundtrip
    monkeypatch.setitem(train_editor.BATCHES, (64, 64), tasks)
    monkeypatch.setattr(train_vae, "vae_images", lambda step, count, side, device: images(step, 4, 32, device))
    monkeypatch.setattr(train_vae, "roundtrip", lambda vae, device: roundtrip(vae, device, 64, 1))
    monkeypatch.setattr(torch.optim, "Muon", partial(torch.optim.Muon, ns_steps=0))
    monkeypatch.setattr(landmarks, "SAMPLES", 16)
    for name, value in (("SIDE", 64), ("SAMPLES", 16), ("WITH_IMAGE", 2), ("IMAGE_TOKENS", 8)):
        monkeypatch.setattr(inherit_places, name, value)
    for module in (train_text, neighbour_block):
        monkeypatch.setattr(module, "BATCH", tasks)
