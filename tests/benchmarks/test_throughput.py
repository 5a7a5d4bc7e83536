"""Throughput of batches: what is measured, and the command that measures it."""

import json

import pytest

from benchmarks import throughput
from specedit import cli


def test_throughput_adds_the_workers_and_leaves_out_their_first_rows():
    times = {"a": [9.0, 2.0, 2.0], "b": [5.0, 4.0]}
    table = [{"worker": worker, "seconds": seconds} for worker, rows in times.items() for seconds in rows]
    found = throughput.throughput(table, seconds=20.0)
    assert found == {"workers": 2, "pictures_per_minute": 45.0, "seconds_a_row": 3.0, "other_seconds": 9.0}
    assert [options for _, options, _ in throughput.cases(2, small=False)] == [
        [], ["--ray", "--actors", "2", "--cpus", "1"]
    ]  # fmt: skip


@pytest.mark.thorough
def test_a_small_measurement_is_written(tmp_path, capsys, monkeypatch):
    """The command runs in this process, whose imports are made."""
    ran = []
    monkeypatch.setattr(throughput, "run_command", lambda words, _: ran.append(cli.main([*words, "--steps", "1"])))
    out = tmp_path / "t.json"
    throughput.main(["--small", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert ran == [0] and row["case"] == "one process, 1 threads" and (row["rows"], row["workers"]) == (4, 1)
    assert row["pictures_per_minute"] > 0 and row["seconds"] > row["other_seconds"] > 0
    assert "pictures a minute" in capsys.readouterr().out
