"""The curve of one step against tokens, on tiny widths."""

import json

import pytest
import torch

from benchmarks import end_to_end
from benchmarks.transformer_steps import SHARES, SIDES, sequences
from specedit.layout import TokenGrid

TINY = ["--tiny", "--part", "transformer", "--repeat", "1", "--size", "128x128", "--batch", "2"]


def test_sequences_cover_draft_to_full_size():
    got = [(kind, layout.tokens, layout.is_mixed) for kind, layout in sequences(TokenGrid(64, 64), torch.device("cpu"))]
    assert [n for kind, n, _ in got if kind == "fine"] == [16, 64, 256, 576, 1024, 2304, 4096]
    mixed = [n for kind, n, is_mixed in got if kind == "mixed" and is_mixed]
    assert mixed == [1024 + 3 * round(share * 1024) for share in SHARES]


def test_odd_and_tiny_grids_have_no_empty_sequence():
    for grid in (TokenGrid(1, 1), TokenGrid(5, 3)):
        assert all(layout.tokens > 0 for _, layout in sequences(grid, torch.device("cpu")))


@pytest.mark.thorough
def test_every_sequence_is_timed_once(tmp_path, capsys):
    path = tmp_path / "steps.json"
    given = ["--json", str(path), *TINY, "--model", "flux-kontext", "--execution", "eager"]
    assert end_to_end.main([*given, "--minutes", "0"]) == 0
    assert f"{len(SIDES) + len(SHARES)} left" in capsys.readouterr().out
    assert end_to_end.main(given) == 0
    steps = json.loads(path.read_text())["transformer"]
    assert {s["case"]["layout"] for s in steps} == {"fine", "mixed"}
    assert all(s["ms"] > 0 and s["tflops"] > 0 for s in steps)
    tokens = [s["case"]["tokens"] for s in steps if s["case"]["layout"] == "fine"]
    assert len(tokens) == len(set(tokens)) and max(tokens) == pytest.approx(8 + 2 * 64)
    assert end_to_end.main(given) == 0
    assert json.loads(path.read_text())["transformer"] == steps
