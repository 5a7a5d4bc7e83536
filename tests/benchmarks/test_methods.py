"""The table of all methods: what stands in it, and that a run of it can be continued and extended."""

import json
from functools import partial

import pytest

from benchmarks import methods
from benchmarks.scores import editor, fitting
from specedit.config import resolve
from specedit.registry import forecasts
from specedit.registry import methods as registered


def test_every_method_and_cache_has_its_rows():
    every = methods.variants()
    groups = {name: settings["group"] for name, settings in every.items()}
    assert [name for name, group in groups.items() if group == "stock"][:2] == ["stock-50", "stock-28"]
    for name in set(registered) - {"steps"}:
        rows = [row for row in every if row.split()[0] == name]
        assert len(rows) == max(1, len(registered[name].published)) and {groups[row] for row in rows} == {"method"}
    assert {row.split()[0] for row, group in groups.items() if group == "cache"} == set(forecasts)


@pytest.mark.thorough
def test_a_run_scores_both_sides_and_a_users_method(tmp_path):
    out, plugin = tmp_path / "m.json", tmp_path / "mine.py"
    plugin.write_text(
        "from dataclasses import dataclass\n"
        "from specedit.methods import Steps, register_method\n\n\n"
        "@register_method\n@dataclass(frozen=True)\nclass Mine(Steps):\n    name = 'mine'\n    published = {}\n"
    )
    given = ["--size", "64", "--cases", "1", "--textures", "0", "--out", str(out), "--plugin", str(plugin)]
    try:
        methods.main([*given, "--only", "stock-1", "mine default", "turbo-reference"])
    finally:
        registered.unregister("mine")
    rows = {row["variant"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["stock-1", "mine default", "turbo-reference"]
    assert rows["mine default"]["nfe"] == 28 and rows["mine default"]["fields"] == {"method": "Mine(count=28)"}
    # The last block computes the target's rows alone.
    assert 20 < rows["mine default"]["mean"]["flops"] / rows["stock-1"]["mean"]["flops"] < 28
    assert rows["turbo-reference"]["preset"] == "turbo"


@pytest.mark.thorough
def test_every_single_switch_runs(shallow_editors, tmp_path):
    every, out = methods.variants(), tmp_path / "m.json"
    ideas = [name for name, settings in every.items() if settings["group"] == "idea"]
    for name in ideas:
        config = resolve(every[name]["preset"], **every[name]["fields"])
        assert methods.IDEAS[name].items() <= vars(config).items() and config != resolve("turbo")
    methods.main(["--size", "64", "--cases", "1", "--out", str(out), "--only", *ideas])
    rows = {row["variant"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ideas == list(methods.IDEAS)
    assert {row["nfe"] for row in rows.values()} == {9}


def test_an_unknown_row_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"^--only: expected some of stock-50"):
        methods.main(["--only", "stock-51", "--out", str(tmp_path / "m.json")])


def test_what_an_editor_cannot_run_is_named_before_any_work(capsys):
    """The embedded Qwen editor computes no single tokens again, and no predictor was trained for it."""
    pipe, every = editor("qwen"), methods.variants()
    stock = type(pipe)
    chosen = {name: every[name] for name in ("stock-4", "reuse N=3", "duca N=3", "lesa N=3")}
    why_not = partial(methods.unfit, pipe)
    assert list(fitting(chosen, why_not)) == ["stock-4", "reuse N=3"]
    said = capsys.readouterr().out
    assert "duca N=3: left out: forecast: 'duca' computes single tokens again" in said
    assert "lesa N=3: left out: forecast='lesa': no trained predictor" in said
    with pytest.raises(SystemExit, match=r"^--only: 'duca N=3' does not fit this editor: forecast"):
        fitting(chosen, why_not, named=True)
    assert type(pipe) is stock  # nothing is left installed
