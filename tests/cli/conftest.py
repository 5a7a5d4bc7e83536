"""What the tests of the command line share: a picture, and an editor that answers at once."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from specedit import cli, pipelines
from specedit.config import resolve
from specedit.run_report import RunReport, StageReport


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "in.png"
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(path)
    return path


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """Runs a command in an empty folder that must be refused before a pipeline is loaded; returns the one line."""

    def run(*arguments):
        monkeypatch.setattr(pipelines, "load", lambda *_, **__: pytest.fail("a pipeline was loaded"))
        monkeypatch.chdir(tmp_path)
        assert cli.main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("specedit: ") and error.count("\n") == 1
        return error

    return run


class Editor:
    """Returns the picture with its colours inverted."""

    def __init__(self):
        self.calls, self.configs = [], []

    def __call__(
        self, image, prompt, num_inference_steps=50, generator=None, edit_mask=None, _auto_resize=True, **more
    ):
        self.calls.append(dict(image=image, prompt=prompt, num_inference_steps=num_inference_steps, **more))
        return SimpleNamespace(images=[Image.eval(image, lambda value: 255 - value)])


@pytest.fixture
def editor(monkeypatch):
    """`specedit edit` runs this editor, whose report says that the top left quarter was edited."""
    pipe = Editor()
    mask = torch.zeros(1, 2, 2, dtype=torch.bool)
    mask[0, 0, 0] = True
    pipe.report = RunReport(
        nfe=9, draft_steps=8, stages=[StageReport("full", 1.0, 0.0, 9, 600, 2e12, 0.5)], flops=2e12, flops_stock=20e12,
        seconds=0.5, edit_mask=mask, expand_mask=mask.clone(), config=resolve("turbo"),
    )  # fmt: skip
    monkeypatch.setattr(pipelines, "load", lambda *_, **__: (pipe, lambda image: (image, {})))
    monkeypatch.setattr("specedit.api.installing.install", lambda pipe, config, **_: pipe.configs.append(config))
    monkeypatch.setattr("specedit.api.installing.last_report", lambda pipe: pipe.report)
    return pipe
