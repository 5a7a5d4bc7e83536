"""The trainer: it learns, stops and resumes."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specedit.micro import kontext, load, qwen, scenes
from specedit.micro.vocabulary import ALL_KINDS
from training.micro import (
    build,
    build_qwen,
    families,
    family_kontext,
    loop,
    probes,
    train,
    train_editor,
    train_vae,
)


def test_mixture_is_a_distribution_at_every_moment():
    for progress in (0.0, 0.3, 0.5, 0.9, 1.0):
        shares = train_editor.mixture(progress)
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
    assert train_editor.mixture(0.0)[512] == 0 and train_editor.mixture(1.0)[512] > 0


def test_half_of_the_tasks_are_practised_kinds():
    usual = train_editor.shares()
    assert usual == train_editor.SHARES
    got = train_editor.shares(("shape", "remove"))
    assert sum(got.values()) == pytest.approx(1)
    assert {kind: got[kind] / usual[kind] for kind in ("add", "background", "recolor", "greyscale")} == pytest.approx(
        dict.fromkeys(("add", "background", "recolor", "greyscale"), 0.5)
    )
    assert got["shape"] / got["remove"] == pytest.approx(usual["shape"] / usual["remove"])
    seeds = iter(loop.seeds(0, 10**6))
    drawn = train_editor.draw_tasks(seeds, 200, random.Random(0), practise=["remove"])
    assert 0.45 < sum(task.kind == "remove" for task in drawn) / 200 < 0.65  # a half and 0.05


def test_enter_sets_the_start_in_the_curriculum(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_editor, "mixture", lambda progress: seen.append(progress) or {64: 1.0})
    monkeypatch.setattr(train_editor, "encode", lambda _pipe, tasks, *_: SimpleNamespace(kinds=[t.kind for t in tasks]))
    more = dict(practise=("greyscale",), enter=0.6)

    def first(progress: float, **settings) -> SimpleNamespace:
        clock = SimpleNamespace(progress=progress)
        return next(train_editor.batches(None, loop.Settings(tmp_path, **settings), clock, 0))

    first(0.5, **more)  # from nothing: the whole curriculum
    batch = first(0.5, start=tmp_path, **more)
    first(1.0, start=tmp_path, **more)
    first(0.0, start=tmp_path)
    first(0.5, start=tmp_path, enter=0.4, leave=0.6)
    assert seen == pytest.approx([0.5, 0.8, 1.0, 0.5, 0.5])
    assert 0.3 < batch.kinds.count("greyscale") / len(batch.kinds) < 0.75  # a half and 0.02, of 64


def test_wrong_options_are_refused_before_any_work(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"--practise: expected some of add, .*, got paint"):
        train.train(loop.Settings(out, practise=("shape", "paint")))
    with pytest.raises(ValueError, match=r"--enter: expected 0 to 1, got 1\.5"):
        train.train(loop.Settings(out, enter=1.5))
    with pytest.raises(ValueError, match=r"--batch-scale: expected more than 0, got 0"):
        train.train(loop.Settings(out, batch_scale=0))
    with pytest.raises(ValueError, match=r"--leave: expected 0, where the curriculum is entered, to 1, got 1\.5"):
        train.train(loop.Settings(out, leave=1.5))
    with pytest.raises(ValueError, match=r"--leave: expected 0\.5, .*, to 1, got 0\.4"):
        train.train(loop.Settings(out, start=tmp_path, leave=0.4))
    assert not out.exists()


def test_every_batch_size_belongs_to_one_side():
    drawn = [size for side in train_editor.mixture(0.0) for size in train_editor.sizes(side)]
    assert sorted(drawn) == sorted(train_editor.BATCHES)  # each once
    assert (192, 320) in train_editor.sizes(256) and (512, 384) in train_editor.sizes(512)


def test_learning_rate_warms_up_and_decays():
    assert loop.rate_at(0.0, 0) < loop.rate_at(0.0, 50) < loop.rate_at(0.0, 100) == 1
    assert loop.rate_at(1.0, 1000) == pytest.approx(0.05)
    assert loop.rate_at(0.9, 1000) < loop.rate_at(0.5, 1000) < 1


def test_training_never_sees_an_evaluation_seed():
    assert min(loop.seeds(0, 5)) >= scenes.TRAINING_SEED


def test_packing_matches_the_pipeline():
    from diffusers import FluxKontextPipeline

    latents = torch.randn(2, 16, 8, 12)
    assert torch.equal(train_editor.pack(latents), FluxKontextPipeline._pack_latents(latents, 2, 16, 8, 12))


def test_ids_match_the_pipeline():
    from diffusers import FluxKontextPipeline

    expected = FluxKontextPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    assert torch.equal(family_kontext.ids((3, 5), 0, "cpu"), expected)


def test_average_follows_and_swaps():
    module = torch.nn.Linear(2, 2)
    average = loop.Average([module], 0.5)
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
    batch = train_editor.encode(pipe, [scenes.describe(s) for s in loop.seeds(0, 4)], (64, 64), "cpu")
    assert batch.source.shape == (4, 16, 64) and batch.grid == (4, 4)
    assert set(batch.edited.unique().tolist()) <= {0.0, 1.0} and batch.edited.any()
    batch.target = 10 * batch.edited[..., None].expand_as(batch.target)  # an error of 101 there, of 1 elsewhere
    loss = float(train_editor.editor_loss(pipe, batch, "cpu", torch.Generator().manual_seed(0))["flow"])
    edited, weight = batch.edited.bool(), train_editor.token_weights(batch.edited)
    expected = (101 * weight[edited].sum() + weight[~edited].sum()) / weight.sum()
    assert loss == pytest.approx(float(expected), rel=0.02)


def test_small_edits_weigh_more_per_token_and_less_in_total():
    """1 + W / sqrt(share): sixteen times the area weighs four times as much in all, beside what every token weighs."""
    edited = torch.zeros(3, 64)
    edited[0, :4], edited[1] = 1, 1
    weight = train_editor.token_weights(edited)
    assert torch.equal(weight[edited == 0], torch.ones(60 + 64))  # and no edit at all divides by nothing
    extra = (weight - 1).sum(1)
    assert float(extra[1]) == pytest.approx(4 * float(extra[0]))
    assert float(weight[1, 0]) == pytest.approx(1 + train_editor.EDIT_WEIGHT)


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


@pytest.mark.thorough
def test_loss_of_an_untrained_editor_is_that_of_predicting_zero():
    pipe = build.kontext()
    batch = train_editor.encode(pipe, [scenes.describe(s) for s in loop.seeds(0, 8)], (64, 64), "cpu")
    losses = train_editor.editor_loss(pipe, batch, "cpu", torch.Generator().manual_seed(0))
    assert set(losses) == {"flow", "total"}  # no probes, no other losses
    assert torch.equal(losses["flow"], losses["total"])
    weight = train_editor.token_weights(batch.edited)
    expected = float(((1 + batch.target**2).mean(-1) * weight).sum() / weight.sum())
    assert float(losses["flow"]) == pytest.approx(expected, rel=0.15)


@pytest.mark.thorough
def test_train_resume_and_continue_from_weights(tmp_path, few_tasks):
    few = dict(vae_minutes=10.0, text_minutes=10.0, minutes=10.0, largest=64)
    torch.manual_seed(0)
    train.train(loop.Settings(tmp_path / "run", steps=1, **few))
    first = torch.load(tmp_path / "run" / "editor.pt", weights_only=True)
    assert first["step"] == 1 and (tmp_path / "run" / "editor" / "model_index.json").exists()
    train.train(loop.Settings(tmp_path / "run", steps=2, **few))
    second = torch.load(tmp_path / "run" / "editor.pt", weights_only=True)
    assert second["step"] == 2 and second["seconds"] > first["seconds"]
    old, new = (s["modules"][0]["x_embedder.weight"] for s in (first, second))
    assert not torch.equal(old, new) and torch.allclose(old, new, atol=0.1)

    start = tmp_path / "run" / "editor"
    more = few | dict(batch_scale=2, practise=("texture",), without_probes=True)
    pipe = train.train(loop.Settings(tmp_path / "more", start=start, steps=1, **more))
    state = torch.load(tmp_path / "more" / "editor.pt", weights_only=True)
    assert state["step"] == 1 and len(state["modules"]) == 3  # transformer and text encoders
    kept = kontext.read(start, torch_dtype=torch.float32).vae.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in pipe.vae.state_dict().items())


@pytest.mark.thorough
def test_train_and_resume_qwen(tmp_path, few_tasks):
    few = dict(vae_minutes=10.0, text_minutes=10.0, minutes=10.0, largest=64, model="qwen")
    train.train(loop.Settings(tmp_path / "run", steps=1, **few))
    pipe = train.train(loop.Settings(tmp_path / "run", steps=2, **few))
    state = torch.load(tmp_path / "run" / "editor.pt", weights_only=True)
    assert state["step"] == 2 and len(state["modules"]) == 3  # transformer, text encoder, probes
    again = qwen.read(tmp_path / "run" / "editor", torch_dtype=torch.float32)
    for name in ("transformer", "text_encoder", "vae"):
        pairs = zip(getattr(pipe, name).parameters(), getattr(again, name).parameters(), strict=True)
        assert all(torch.equal(a.half().float(), b) for a, b in pairs)
    assert again.vae.config.latents_std == pipe.vae.config.latents_std != [1.0] * 16  # as measured
    with pytest.raises(ValueError, match=r"--out: expected a FluxKontextPipeline in .*, got a Qwen"):
        train.train(loop.Settings(tmp_path / "run", steps=1, **few | {"model": "kontext"}))
    with pytest.raises(ValueError, match="--start: expected a FluxKontextPipeline"):
        train.train(loop.Settings(tmp_path / "new", start=tmp_path / "run" / "editor", **few | {"model": "kontext"}))


@pytest.mark.thorough
def test_gradients_reach_every_used_parameter_of_qwen(few_blocks):
    torch.manual_seed(0)
    pipe = families.family_named("qwen").build(0)
    probes = train_editor.Probes(pipe.transformer, families.family_of(pipe).probed_blocks(pipe.transformer))
    for module in (pipe.transformer.proj_out, *(b.img_mod[1] for b in pipe.transformer.transformer_blocks)):
        module.reset_parameters()  # they start at zero, and nothing before them would learn in the first step
    for module in (b.txt_mod[1] for b in pipe.transformer.transformer_blocks):
        module.reset_parameters()
    modules = dict(transformer=pipe.transformer, text_encoder=pipe.text_encoder, probes=probes)
    for module in modules.values():
        module.train().requires_grad_(True)
    batch = train_editor.encode(pipe, [scenes.describe(s) for s in loop.seeds(0, 3)], (64, 64), "cpu")
    losses = train_editor.editor_loss(pipe, batch, "cpu", torch.Generator().manual_seed(0), probes=probes)
    assert set(losses) == {"flow", *train_editor.PROBE_WEIGHTS, "total"}
    losses["total"].backward()
    idle = {
        f"{name}.{inner}" for name, module in modules.items() for inner, p in module.named_parameters()
        if p.grad is None or not p.grad.any()
    }  # fmt: skip
    # The last block's text output is unused.
    unread = ("txt_mlp", "txt_norm2", "to_add_out", "add_q_proj", "norm_added_q")
    expected = {name for name in idle if "transformer_blocks.3." in name and any(part in name for part in unread)}
    assert idle == expected and expected


def test_a_matrix_of_a_block_takes_an_orthogonal_step():
    """As it is trained, with the products that the small trainings leave out."""
    model, rate = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(16, 16)])}), 1e-2
    before = model["blocks"][0].weight.detach().clone()
    parameters, optims = list(model.parameters()), loop.optimizers([model], rate)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    loop.descend(model["blocks"][0](x).square().mean(), parameters, optims, rate)
    step = (before * (1 - 0.01 * rate) - model["blocks"][0].weight).detach() / rate  # without the weight's decay
    values = torch.linalg.svdvals(step / 0.2 / 4)  # match_rms_adamw: 0.2 sqrt(16)
    assert values.isfinite().all() and values.min() > 0.5 and values.max() < 1.3


def test_muon_excludes_modulation():
    pipe = build_qwen.qwen()
    adam, muon = loop.optimizers([pipe.transformer], 1e-3)
    block = pipe.transformer.transformer_blocks[0]
    of_muon = {id(p) for p in muon.param_groups[0]["params"]}
    assert id(block.attn.to_q.weight) in of_muon and id(block.txt_mlp.net[2].weight) in of_muon
    assert id(block.img_mod[1].weight) not in of_muon and id(block.txt_mod[1].weight) not in of_muon
    assert sum(len(o.param_groups[0]["params"]) for o in (adam, muon)) == len(list(pipe.transformer.parameters()))


@pytest.mark.thorough
def test_focused_tasks_share_a_place_and_have_every_kind():
    rng, seeds = random.Random(0), iter(loop.seeds(0, 10**6))
    tasks = train_editor.draw_tasks(seeds, 200, rng, (2, 0))
    assert {scene.kind for scene in tasks} == set(train_editor.SHARES) == set(ALL_KINDS)
    assert {scene.place for scene in tasks} == {(2, 0), None}
    assert len({scene.place for scene in train_editor.draw_tasks(seeds, 200, rng)}) == 10
    assert sum(train_editor.SHARES.values()) == pytest.approx(1)


def test_focus_keeps_tokens_around_small_edits():
    grid = (12, 20)
    edited = torch.zeros(3, *grid)
    edited[0, 3:6, 4:7] = edited[1, 4:7, 5:9] = 1
    edited[2] = 1  # the whole picture: has no place
    at = train_editor.focus(edited.flatten(1), grid)
    assert len(at) == math.ceil(train_editor.FOCUS * 240) and torch.equal(at, at.unique())
    near = torch.zeros(grid)
    near[2:8, 3:10] = 1
    near[7, 3] = near[2, 8:10] = 0  # a token away from neither edit
    wanted = set(near.flatten().nonzero().flatten().tolist())
    assert wanted < set(at.tolist())
    assert set(at.tolist()) != set(train_editor.focus(edited.flatten(1), grid).tolist())  # the others by chance
    whole = train_editor.focus(edited[2:].flatten(1), grid)
    assert len(whole) == len(at) and int(whole.max()) > 200


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["kontext", "qwen"])
def test_selected_tokens_keep_their_positions(name):
    """A permutation of all tokens permutes the velocities; without most of the tokens they differ."""
    torch.manual_seed(0)
    pipe = load(name)
    batch = train_editor.encode(pipe, [scenes.describe(s) for s in loop.seeds(0, 2)], (64, 96), "cpu")
    noise = torch.randn_like(batch.target)

    @torch.no_grad()
    def velocity(batch, x):
        kind = families.family_of(pipe)
        features = kind.text(pipe, batch.prompts, batch.vision, "cpu")
        call = (x, batch.source, batch.grid, torch.tensor([0.9, 0.4]), features, batch.at)
        return kind.velocity(pipe, *call, generator=torch.Generator().manual_seed(0))

    whole, order = velocity(batch, noise), torch.randperm(24)
    mixed = batch.select(order)
    assert torch.equal(mixed.edited, batch.edited[:, order]) and torch.equal(mixed.target, batch.target[:, order])
    assert torch.equal(mixed.labels.token, batch.labels.token[:, order])
    assert torch.allclose(velocity(mixed, noise[:, order]), whole[:, order], atol=1e-4)
    few = order[:6]
    assert not torch.allclose(velocity(batch.select(few), noise[:, few]), whole[:, few], atol=1e-2)
    assert not getattr(pipe.transformer.pos_embed, "_forward_hooks", None)


@pytest.mark.thorough
def test_steps_at_512_px_are_mostly_focused(monkeypatch):
    def encode(_pipe, tasks, size, _device):
        grid = (size[0] // 16, size[1] // 16)
        empty = torch.zeros(len(tasks), math.prod(grid), 1)
        mask = scenes.draw(tasks, *grid)[2].float().flatten(1)
        return train_editor.Batch(grid, empty, empty, [], train_editor.Labels(tasks, grid, mask))

    monkeypatch.setattr(train_editor, "encode", encode)
    settings = loop.Settings(Path(), seed=1)
    stream = train_editor.batches(None, settings, loop.Clock(0.0), 0)  # at its end
    drawn = [next(stream) for _ in range(50)]
    focused = [b for b in drawn if b.at is not None]
    large = [b for b in drawn if max(b.grid) == 32]
    assert len(large) / 2 < len(focused) < len(large) and all(max(b.grid) == 32 for b in focused)
    for b in focused:
        n = math.ceil(train_editor.FOCUS * math.prod(b.grid))
        count = 2 / train_editor.FOCUS
        assert b.target.shape == (count, n, 1) and b.edited.shape == (count, n) and b.edited.any(1).all()
        assert torch.equal(b.labels.position, probes.position_features(b.grid)[b.at])
    again = next(b for i, b in enumerate(focused) if any(b.labels.prompt is c.labels.prompt for c in focused[:i]))
    parts = [b.at for b in focused if b.labels.prompt is again.labels.prompt]
    assert not torch.equal(parts[0], parts[1])  # a batch that returns has other tokens


@pytest.mark.parametrize(("scale", "count"), [(0.5, 32), (2, 128), (0.001, 1)])
def test_batch_scale_multiplies_the_batch(monkeypatch, scale, count):
    monkeypatch.setattr(train_editor, "mixture", lambda _progress: {64: 1.0})
    monkeypatch.setattr(train_editor, "encode", lambda _pipe, tasks, *_: SimpleNamespace(tasks=tasks))
    batch = next(train_editor.batches(None, loop.Settings(Path(), batch_scale=scale), loop.Clock(1.0), 0))
    assert len(batch.tasks) == count


def test_continued_training_starts_in_the_middle_of_the_curriculum(monkeypatch):
    asked = []
    monkeypatch.setattr(train_editor, "mixture", lambda progress: asked.append(progress) or {64: 1.0})
    monkeypatch.setattr(train_editor, "encode", lambda *_: train_editor.Batch((1, 1), None, None, [], None))
    for start, progress in ((None, 0.25), (Path("weights"), 0.625)):
        clock = loop.Clock(1.0, spent=15.0)
        next(train_editor.batches(None, loop.Settings(Path(), start=start), clock, 0))
        assert asked.pop() == pytest.approx(progress, abs=0.02)


@pytest.mark.thorough
def test_loss_of_selected_tokens_uses_the_grids_noise_levels():
    """The shift must depend on the grid, not on the number of selected tokens."""
    pipe = build.kontext()  # untrained: predicts nothing, so that the loss is what the tokens make it
    batch = train_editor.encode(pipe, [scenes.describe(s) for s in loop.seeds(0, 4)], (128, 128), "cpu")
    at = train_editor.focus(batch.edited, batch.grid)
    levels = []
    with pytest.MonkeyPatch.context() as patch:
        real = train_editor.noise_levels
        patch.setattr(train_editor, "noise_levels", lambda *a, **k: levels.append(real(*a, **k)) or levels[-1])
        for one in (batch, batch.select(at)):
            loss = train_editor.editor_loss(pipe, one, "cpu", torch.Generator().manual_seed(0))["flow"]
            weight = train_editor.token_weights(one.edited)
            expected = (((1 + one.target**2).mean(-1)) * weight).sum() / weight.sum()
            assert float(loss) == pytest.approx(float(expected), rel=0.1)
    assert torch.equal(*levels)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "rate", "steps"), [("kontext", 2e-4, 12), ("qwen", 1e-4, 20)])
def test_autoencoder_learns(name, rate, steps):
    """It improves on its thumbnail initialisation, for one batch under the same noise."""
    torch.manual_seed(0)
    pipe = families.family_named(name).build(0)
    pipe.vae.train().requires_grad_(True)
    vae = families.family_of(pipe).flat(pipe.vae)
    images = train_vae.vae_images(0, 2, 32, "cpu")
    optimizer = torch.optim.AdamW(pipe.vae.parameters(), lr=rate)
    errors = []
    for _ in range(steps):
        torch.manual_seed(1)
        loss, error = train_vae.vae_loss(vae, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(error)
    assert errors[-1] < 0.7 * errors[0]
