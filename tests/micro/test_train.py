"""The trainer: it learns, it stops, it goes on where it was."""

import pytest
import torch

from specedit.micro import build, scenes, train, train_editor, train_vae, training


def test_mixture_is_a_distribution_at_every_moment():
    for progress in (0.0, 0.3, 0.5, 0.9, 1.0):
        shares = train_editor.mixture(progress)
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
    assert train_editor.mixture(0.0)[512] == 0 and train_editor.mixture(1.0)[512] > 0


def test_learning_rate_warms_up_and_decays():
    assert training.rate_at(0.0, 0) < training.rate_at(0.0, 50) < training.rate_at(0.0, 100) == 1
    assert training.rate_at(1.0, 1000) == pytest.approx(0.05)
    assert training.rate_at(0.9, 1000) < training.rate_at(0.5, 1000) < 1


def test_training_never_sees_an_evaluation_seed():
    assert min(training.seeds(0, 5)) >= scenes.TRAINING_SEED


def test_packing_is_the_pipelines():
    from diffusers import FluxKontextPipeline

    latents = torch.randn(2, 16, 8, 12)
    assert torch.equal(train_editor.pack(latents), FluxKontextPipeline._pack_latents(latents, 2, 16, 8, 12))


def test_ids_are_the_pipelines():
    from diffusers import FluxKontextPipeline

    expected = FluxKontextPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    assert torch.equal(train_editor.ids((3, 5), 0, "cpu"), expected)


def test_average_follows_and_swaps():
    module = torch.nn.Linear(2, 2)
    average = training.Average([module], 0.5)
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 1
    for _ in range(40):
        average.update()
    average.swap()
    assert torch.allclose(module.weight, before + 1, atol=1e-3)
    average.swap()
    assert torch.equal(module.weight, before + 1)


def test_edited_tokens_weigh_more():
    pipe = build.kontext()
    batch = train_editor.encode(pipe.vae, training.seeds(0, 4), (64, 64), "cpu")
    assert batch.source.shape == (4, 16, 64) and batch.grid == (4, 4)
    assert set(batch.edited.unique().tolist()) <= {0.0, 1.0} and batch.edited.any()
    batch.target = 10 * batch.edited[..., None].expand_as(batch.target)  # an error of 101 there, of 1 elsewhere
    loss = float(train_editor.editor_loss(pipe, batch, "cpu", torch.Generator().manual_seed(0))["flow"])
    share, weight = float(batch.edited.mean()), 1 + train_editor.EDIT_WEIGHT
    expected = (101 * weight * share + 1 - share) / (weight * share + 1 - share)
    assert loss == pytest.approx(expected, rel=0.02)


def test_noise_levels_follow_the_share_from_the_top():
    config = build.scheduler().config
    draw = dict(generator=torch.Generator().manual_seed(0))
    top = train_editor.noise_levels(4000, 64, 1.0, config, **draw)
    assert float(top.min()) >= train_editor.HIGH and float(top.max()) <= 1
    plain = train_editor.noise_levels(4000, 64, 0.0, config, **draw)
    assert float(plain.min()) > 0 and 0.5 < float(plain.median()) < 0.75  # shifted, but not to the top
    half = train_editor.noise_levels(4000, 64, 0.5, config, **draw)
    above = [float((s > train_editor.HIGH).float().mean()) for s in (plain, half, top)]
    assert above[1] == pytest.approx((above[0] + above[2]) / 2, abs=0.05)


def test_the_loss_of_an_untrained_editor_is_that_of_predicting_nothing():
    pipe = build.kontext()
    batch = train_editor.encode(pipe.vae, training.seeds(0, 8), (64, 64), "cpu")
    losses = train_editor.editor_loss(pipe, batch, "cpu", torch.Generator().manual_seed(0))
    assert set(losses) == {"flow", "total"}  # nothing else is asked without questions
    assert torch.equal(losses["flow"], losses["total"])
    weight = 1 + train_editor.EDIT_WEIGHT * batch.edited
    expected = float(((1 + batch.target**2).mean(-1) * weight).sum() / weight.sum())
    assert float(losses["flow"]) == pytest.approx(expected, rel=0.15)


def test_train_resume_and_go_on_from_weights(tmp_path):
    few = dict(vae_minutes=10.0, text_minutes=10.0, minutes=10.0, largest=64)
    torch.manual_seed(0)
    train.train(training.Settings(tmp_path / "run", steps=2, **few))
    first = torch.load(tmp_path / "run" / "editor.pt", weights_only=True)
    assert first["step"] == 2 and (tmp_path / "run" / "editor" / "model_index.json").exists()
    train.train(training.Settings(tmp_path / "run", steps=3, **few))
    second = torch.load(tmp_path / "run" / "editor.pt", weights_only=True)
    assert second["step"] == 3 and second["seconds"] > first["seconds"]
    old, new = (s["modules"][0]["x_embedder.weight"] for s in (first, second))
    assert not torch.equal(old, new) and torch.allclose(old, new, atol=0.1)

    start = tmp_path / "run" / "editor"
    pipe = train.train(training.Settings(tmp_path / "more", start=start, steps=1, batch_scale=2, **few))
    kept = build.load(start, torch_dtype=torch.float32).vae.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in pipe.vae.state_dict().items())


def test_the_autoencoder_learns():
    """It gets one batch better than its start as an interpolated thumbnail, under the same noise."""
    torch.manual_seed(0)
    vae = build.autoencoder().train()
    images = train_vae.vae_images(0, 4, 32, "cpu")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-4)
    errors = []
    for _ in range(30):
        torch.manual_seed(1)
        loss, error = train_vae.vae_loss(vae, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(error)
    assert errors[-1] < 0.7 * errors[0]
