"""`python -m benchmarks.call_overhead` divides a call's time as it says."""

import cProfile
import json

import pytest
import torch

from benchmarks import call_overhead
from benchmarks.call_overhead import COLUMNS, is_operator, profiled


def test_operators_are_told_from_python():
    assert is_operator(("~", 0, "<built-in method torch._C._nn.linear>"))
    assert is_operator(("~", 0, "<method 'to' of 'torch._C.TensorBase' objects>"))
    assert is_operator(("~", 0, "<built-in method torch.cat>"))
    assert not is_operator(("~", 0, "<built-in method torch._C._get_tracing_state>"))
    assert not is_operator(("~", 0, "<built-in method builtins.hasattr>"))
    assert not is_operator(("torch/nn/modules/module.py", 1, "_call_impl"))


def test_operators_and_python_make_up_the_whole():
    x = torch.randn(300, 300)

    def python():
        return sum(i * i for i in range(20_000))

    profiler = cProfile.Profile()
    profiler.runcall(lambda: [torch.mm(x, x) for _ in range(20)] and python())
    whole, operators, calls = profiled(profiler)
    assert 0 < operators < whole and 20_000 < calls < 20_100


def test_arithmetic_of_tensors_is_seen_as_operators():
    x, before = torch.randn(300, 300), torch.Tensor.__add__
    profiler = cProfile.Profile()
    with call_overhead.seen_arithmetic():
        profiler.enable()
        y = [(2 * x - 1 + x) / x for _ in range(20)][-1]
        profiler.disable()
    whole, operators, calls = profiled(profiler)
    assert operators > 0.9 * whole and calls < 10
    assert torch.equal(y, (2 * x - 1 + x) / x) and torch.Tensor.__add__ is before


def row(code):
    return dict.fromkeys(COLUMNS, 2.0 if code == "before" else 1.0)


def test_both_checkouts_are_measured_in_turn_and_compared(monkeypatch, tmp_path, capsys):
    (tmp_path / "specedit").mkdir()
    measured = []

    def measured_in(checkout):
        measured.append("before" if checkout == tmp_path.resolve() else "now")
        return [row(measured[-1])]

    monkeypatch.setattr(call_overhead, "measured_in", measured_in)
    out = tmp_path / "out.json"
    assert call_overhead.main(["--rounds", "2", "--before", str(tmp_path), "--json", str(out)]) == 0
    assert measured == ["now", "before"] * 2
    assert "overhead_ms 0.500" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert [one["code"] for one in content["rows"]] == ["now", "before"] and str(tmp_path) not in content["command"]


def test_a_folder_without_the_package_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        call_overhead.main(["--before", str(tmp_path)])
    assert "--before: expected a checkout with specedit, got" in capsys.readouterr().err
