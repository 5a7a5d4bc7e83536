"""The benchmark of host time: what it prints and writes. Its measurements need no test of their own."""

import json

import pytest

from benchmarks import dry_gpu, host_time

pytestmark = pytest.mark.skipif(bool(dry_gpu.missing()), reason=str(dry_gpu.missing()))


def test_two_checkouts_are_compared(tmp_path, monkeypatch, capsys):
    (tmp_path / "other" / "benchmarks" / "dry_gpu").mkdir(parents=True)
    times = iter([30.0, 50.0, 20.0, 60.0, 25.0, 40.0])
    monkeypatch.setattr(host_time, "measured_in", lambda checkout: {"gather_tokens": next(times)})
    file = tmp_path / "host.json"
    assert host_time.main(["--before", str(tmp_path / "other"), "--json", str(file)]) == 0
    assert "20.0 us      40.0 before, 2.00x" in capsys.readouterr().out
    assert json.loads(file.read_text())["rows"] == [{"call": "gather_tokens", "us": 20.0, "us_before": 40.0}]


def test_another_folder_is_no_checkout(tmp_path, capsys):
    with pytest.raises(SystemExit):
        host_time.main(["--before", str(tmp_path)])
    assert "--before: expected a checkout with benchmarks/dry_gpu, got" in capsys.readouterr().err
