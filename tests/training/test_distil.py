"""Distillation into a few steps: the teacher's target, and a student that loads as any LoRA."""

import builtins
import itertools
import json

import pytest
import torch

import specedit
from specedit import micro
from specedit.micro import scenes
from training import distil
from training.micro import build
from training.micro.loop import seeds
from training.micro.train_editor import encode


@pytest.fixture(scope="module")
def trained():
    """An untrained editor with nonzero weights everywhere, so that its output is not zero."""
    pipe = build.kontext(seed=0)
    few = {**pipe.transformer.config, "num_layers": 1, "num_single_layers": 1}
    torch.manual_seed(0)
    pipe.transformer = pipe.transformer.from_config(few).eval()
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            if parameter.ndim == 2:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def student(trained, tmp_path_factory):
    pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("student")
    options = distil.parse(["--out", str(out), "--updates", "3", "--rank", "2", "--largest", "64", "--rate", "1e-3"])
    losses = distil.train(trained, options)
    return trained, out, losses


def picture_call(size=64):
    case = specedit.micro.scenes.sample(1, size)
    return dict(
        image=case.source, prompt=case.prompt, output_type="latent", num_inference_steps=8,
        **specedit.micro.arguments(case.source),
    )  # fmt: skip


def call(pipe):
    return pipe(generator=torch.Generator().manual_seed(0), **picture_call()).images


@pytest.mark.thorough
def test_target_is_the_teachers_result_and_is_learned(trained):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    batch = encode(trained, [scenes.describe(s) for s in seeds(10_000_000, 2)], (64, 64), "cpu")
    parameters = distil.add_lora(trained.transformer, 2)
    try:
        assert sum(p.numel() for p in parameters) < 0.2 * sum(p.numel() for p in trained.transformer.parameters())
        with torch.no_grad():
            prompt = distil.text(trained, batch.prompts, None, "cpu")
            x = torch.randn_like(batch.target)
            wanted = distil.target(trained, batch, x, 0.9, 0.6, 3, prompt)
            state = x
            for sigma, following in itertools.pairwise((0.9, 0.8, 0.7, 0.6)):
                state = state + (following - sigma) * distil.velocity(trained, batch, state, sigma, prompt)
        torch.testing.assert_close(x + (0.6 - 0.9) * wanted, state, rtol=1e-4, atol=1e-4)
        options = distil.parse(["--student-steps", "2"])
        first = torch.optim.Adam(parameters, lr=5e-3)
        losses = []
        for _ in range(8):
            torch.manual_seed(1)  # the same noise: the loss must fall
            loss = distil.loss_of(trained, batch, 0, options)
            first.zero_grad()
            loss.backward()
            first.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]
    finally:
        trained.transformer.unload_lora()


@pytest.mark.thorough
def test_student_loads_fuses_and_unloads(student):
    pipe, out, losses = student
    assert len(losses) == 3 and json.loads((out / "student.json").read_text())["updates"] == 3
    teacher = call(pipe)
    pipe.load_lora_weights(out)
    try:
        student_image = call(pipe)
        assert (student_image - teacher).abs().max() > 1e-4
        specedit.install(pipe, "lightning-8", forecast=None)
        installed = call(pipe)
        assert installed.isfinite().all() and specedit.report(pipe).nfe == 8
        pipe.fuse_lora()
        torch.testing.assert_close(call(pipe), installed, rtol=1e-3, atol=1e-3)
        pipe.unfuse_lora()
        specedit.uninstall(pipe)
        torch.testing.assert_close(call(pipe), student_image, rtol=1e-3, atol=1e-3)
    finally:
        specedit.uninstall(pipe)
        pipe.unload_lora_weights()
    torch.testing.assert_close(call(pipe), teacher, rtol=1e-3, atol=1e-3)


@pytest.mark.thorough
def test_forecast_runs_with_the_lora(student):
    pipe, out, _ = student
    specedit.install(pipe, steps=(0, 0, 8), forecast="taylor", forecast_order=1, forecast_interval=2)
    plain = call(pipe)
    pipe.load_lora_weights(out)
    try:
        assert (call(pipe) - plain).abs().max() > 1e-4 and specedit.report(pipe).cached_steps > 0
    finally:
        specedit.uninstall(pipe)
        pipe.unload_lora_weights()


def test_missing_peft_is_named(trained, monkeypatch):
    real = builtins.__import__

    def without(name, *more, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return real(name, *more, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'distillation needs peft: pip install "specedit\[distil\]"'):
        distil.add_lora(trained.transformer, 2)


def test_wrong_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        distil.parse(["--substeps", "1"])
    assert "--substeps: expected at least 2, got 1" in capsys.readouterr().err


@pytest.mark.thorough
def test_packaged_student_beats_the_editor_at_8_steps():
    pytest.importorskip("peft")
    pipe = micro.load("kontext")
    pipe.set_progress_bar_config(disable=True)
    cases = [micro.scenes.sample(seed, 64) for seed in range(2)]

    def edits(steps):
        call = dict(image=[case.source for case in cases], prompt=[case.prompt for case in cases], output_type="pt")
        generators = [torch.Generator().manual_seed(0) for _ in cases]
        more = micro.arguments(cases[0].source)
        return pipe(**call, **more, num_inference_steps=steps, generator=generators).images

    many, few = edits(32), edits(8)
    pipe.load_lora_weights(micro.STUDENT)
    student = edits(8)
    assert (student - many).square().mean() < 0.8 * (few - many).square().mean()
    specedit.install(pipe, "lightning-8", restore="reference")
    pipe(image=cases[0].source, prompt=cases[0].prompt, **micro.arguments(cases[0].source))
    assert specedit.report(pipe).nfe == 8
    specedit.uninstall(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(edits(8), few)
