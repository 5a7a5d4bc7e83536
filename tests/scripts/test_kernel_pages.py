"""The kernels' tables, goals and pictures, made from results that hold known figures."""

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "scripts" / "kernel_pages.py"


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("kernel_pages", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(op, case, provider, ms, **rate):
    return dict(op=op, case=case, provider=provider, ms=ms, of_roofline=0.5, error=1e-3) | (rate or {"gbps": 1000.0})


ROWS = [
    row("mixed_attention", "coarse", "specedit_kernels", 1.0, tflops=400.0),
    row("mixed_attention", "coarse", "FlexAttention with bias", 1.5, tflops=267.0),
    row("mixed_attention", "coarse", "SDPA cuDNN without bias", 0.7, tflops=571.0),
    row("mixed_attention", "full", "specedit_kernels", 2.0, tflops=450.0),
    row("mixed_attention", "full", "FlexAttention with bias", 2.8, tflops=321.0),
    row("mixed_attention", "full", "SDPA cuDNN without bias", 1.6, tflops=562.0),
    row("gather_tokens", "small", "specedit_kernels", 0.001, of_roofline=0.1, gbps=1000.0),
    row("gather_tokens", "small", "index_select", 0.003),
    row("gather_tokens", "large", "specedit_kernels", 0.1, of_roofline=0.95, gbps=1900.0),
    row("gather_tokens", "large", "index_select", 0.12),
    row("gather_tokens", "large", "advanced indexing", 0.11),
    row("qk_norm_rope", "8704 tokens", "specedit_kernels", 0.1, of_roofline=0.8, gbps=2000.0),
    row("qk_norm_rope", "8704 tokens", "eager chain", 0.5),
]


def test_every_row_is_shown(pages):
    tables = {title: (header, rows) for title, header, rows in pages.measured({"rows": ROWS})}
    assert list(tables) == ["mixed_attention", "gather_tokens", "qk_norm_rope"]
    assert sum(len(rows) for _, rows in tables.values()) == len(ROWS)
    header, rows = tables["mixed_attention"]
    assert header[3] == "TFLOP/s" and rows[0] == ["coarse", "specedit_kernels", "1.000", "400.0", "50%", "1.0e-03"]
    assert tables["gather_tokens"][0][3] == "GB/s"


def test_goals_are_judged_by_the_worst_case(pages):
    _, _, rows = pages.goals({"rows": ROWS})
    found = {(op, what): (value, case, verdict) for op, what, _, value, case, verdict in rows}
    assert found["mixed_attention", "times FlexAttention with the same bias"] == ("1.40", "full", "yes")
    assert found["mixed_attention", "times cuDNN without a bias"] == ("0.70", "coarse", "no")
    assert found["mixed_attention", "times two passes merged"] == ("-", "-", "-")
    # Bandwidth counts from 25 MB on, so the small case with its 10 % does not.
    assert found["gather_tokens", "of copy bandwidth, from 25 MB"] == ("0.95", "large", "yes")
    assert found["gather_tokens", "times PyTorch's fastest"] == ("1.10", "large", "yes")
    assert found["qk_norm_rope", "of copy bandwidth, from 25 MB"] == ("0.80", "8704 tokens", "no")
    assert found["qk_norm_rope", "times the eager chain"] == ("5.00", "8704 tokens", "yes")
    assert found["expand_tokens", "times the eager chain"] == ("-", "-", "-")


def test_the_goal_of_kept_blocks_counts_a_quarter_only(pages):
    times = {1.0: (4.0, 4.0), 0.25: (1.25, 4.0), 0.1: (1.0, 4.0)}
    rows = [
        row("mixed_attention_blocks", f"{share:.0%} kept", name, ms, tflops=1.0) | {"share": share}
        for share, both in times.items()
        for name, ms in zip(("specedit_kernels", "specedit_kernels, every key"), both)
    ]
    _, _, goals = pages.goals({"rows": rows})
    (found,) = (goal for goal in goals if goal[0] == "mixed_attention_blocks")
    assert found[2:] == ["2.86", "3.20", "25% kept", "yes"]


@pytest.mark.slow
def test_a_picture_for_every_operator(pages, tmp_path):
    paths = pages.draw({"rows": ROWS}, tmp_path, "kernels-x")
    assert [path.name for path in paths] == [
        "kernels-x-mixed_attention.png", "kernels-x-gather_tokens.png", "kernels-x-qk_norm_rope.png",
    ]  # fmt: skip
    for path in paths:
        picture = Image.open(path).convert("RGB")
        assert picture.size[0] > 400 and len(picture.getcolors(1 << 20)) > 10
    assert pages.draw({"rows": []}, tmp_path, "none") == []


def test_goals_name_providers_that_the_benchmarks_have(pages):
    """A renamed provider would silently turn its goal into a dash."""
    names = ("attention", "tokens", "block_attention")
    text = "".join((SCRIPT.parents[1] / "benchmarks" / f"test_{name}.py").read_text() for name in names)
    source = SCRIPT.read_text()
    for name in ("FlexAttention with bias", "SDPA cuDNN without bias", "flash, two passes merged by lse",
                 "eager chain", "specedit_kernels", "specedit_kernels, every key"):  # fmt: skip
        assert f'"{name}"' in text and f'"{name}"' in source
