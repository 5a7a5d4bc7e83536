"""A pipeline is asked for its device where it has a choice."""

import torch

from specedit.models.shared.devices import execution_device


class Pipe:
    def __init__(self, device="cpu"):
        self.transformer, self.asked = torch.nn.Linear(2, 2, device=device), 0

    @property
    def _execution_device(self):
        self.asked += 1
        return "cuda:1"


def test_weights_on_a_machine_without_accelerators_are_used_where_they_are(monkeypatch):
    pipe = Pipe()
    for available, device, asked in ((False, torch.device("cpu"), 0), (True, torch.device("cuda:1"), 1)):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda available=available: available)
        assert execution_device(pipe) == device and pipe.asked == asked


def test_weights_elsewhere_are_asked_about(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    pipe = Pipe("meta")
    assert execution_device(pipe) == torch.device("cuda:1") and pipe.asked == 1


def test_a_pipeline_that_does_not_say_runs_on_the_default(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    pipe = type("Silent", (), {"transformer": torch.nn.Linear(2, 2)})()
    assert execution_device(pipe) == torch.device("cpu") and execution_device(pipe, "meta") == torch.device("meta")
