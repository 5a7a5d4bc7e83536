"""The harness of the real-size benchmark, run with tiny widths on a CPU."""

import json
import shutil

import pytest

from benchmarks import end_to_end
from benchmarks.editor_bench import Bench, Case

TINY = ["--tiny", "--repeat", "1", "--size", "128x128", "--preset", "turbo", "--share", "20", "--shape", "blob"]
TINY += ["--stock-steps", "4"]
FLUX = [*TINY, "--model", "flux-kontext", "--execution", "eager"]
KEYS = {
    "model", "preset", "restore", "edit_fraction", "height", "width", "baseline", "seconds_stock", "seconds", "speedup",
    "flops_ratio", "peak_memory_stock", "peak_memory", "stages", "batch", "quotient", "spread", "spread_stock",
    "repeats", "repeats_stock",
}  # fmt: skip


@pytest.fixture(scope="module")
def stock_calls():
    """(seconds, steps that were run) of every stock call of `measured`."""
    return []


@pytest.fixture(scope="module")
def measured(tmp_path_factory, stock_calls):
    path, call = tmp_path_factory.mktemp("bench") / "end_to_end-tiny.json", Bench.call

    def counted(self, case, **more):
        seconds = call(self, case, **more)
        if case.preset is None:
            stock_calls.append((seconds, len(self.pipe.scheduler.timesteps)))
        return seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "call", counted)
        assert end_to_end.main(["--json", str(path), *FLUX, "--batch", "1", "--batch", "2"]) == 0
    return path


@pytest.mark.thorough
def test_rows_hold_what_result_files_promise(measured):
    content = json.loads(measured.read_text())
    assert content["command"].startswith("python -m benchmarks.end_to_end --json") and content["machine"]["torch"]
    assert len(content["measurements"]) == 2 * (1 + 2) and len(content["rows"]) == 2 * 2 and not content["failures"]
    for row in content["rows"]:
        assert set(row) >= KEYS
        assert row["edit_fraction"] == pytest.approx(round(0.2 * 16) / 16)  # of 4 x 4 cells
        assert row["baseline"] == "stock 4 steps, eager, native attention"
        assert row["speedup"] == pytest.approx(row["seconds_stock"] / row["seconds"], rel=1e-4)
        assert row["quotient"] == pytest.approx(row["speedup"] / row["flops_ratio"], rel=1e-4)
        assert row["peak_memory"] is None and row["peak_memory_stock"] is None  # nothing tells on a CPU
        names = [stage["name"] for stage in row["stages"]]
        assert names[:3] == ["encode", "draft", "verify"] and names[-1] == "decode"
        assert all(stage["seconds"] > 0 for stage in row["stages"])
        assert sum(stage["seconds"] for stage in row["stages"]) <= 1.05 * row["seconds"]


@pytest.mark.thorough
def test_the_stock_call_that_is_timed_takes_the_steps_that_rows_name(measured, stock_calls):
    for row in json.loads(measured.read_text())["rows"]:
        steps = [steps for seconds, steps in stock_calls if seconds == pytest.approx(row["seconds_stock"], rel=1e-4)]
        assert row["stock_steps"] == 4 and 4 in steps, (row["seconds_stock"], stock_calls)


@pytest.mark.thorough
def test_unfinished_file_is_resumed(measured, tmp_path, capsys):
    path = tmp_path / "again.json"
    shutil.copy(measured, path)
    before = json.loads(path.read_text())["measurements"]
    assert end_to_end.main(["--json", str(path), *FLUX, "--batch", "1", "--batch", "2"]) == 0
    assert json.loads(path.read_text())["measurements"] == before
    assert "everything is measured" in capsys.readouterr().out
    end_to_end.main(["--json", str(path), *FLUX, "--batch", "1", "--restore", "full", "--share", "100"])
    after = json.loads(path.read_text())["measurements"]
    assert after[: len(before)] == before and len(after) == len(before) + 1
    assert after[-1]["edit_fraction"] == 1.0


def test_spent_budget_stops_before_the_next_measurement(tmp_path, capsys):
    path = tmp_path / "none.json"
    assert end_to_end.main(["--json", str(path), *FLUX, "--minutes", "0"]) == 0
    assert "6 left; run the same command again" in capsys.readouterr().out and not path.exists()


def test_unknown_kind_is_budgeted_as_the_slowest():
    budget = end_to_end.Budget(1)
    assert budget.fits("first")
    budget.taken["stock"] = 59.0
    assert budget.fits("stock")
    budget.taken["stock"] = 61.0
    assert not budget.fits("stock") and not budget.fits("unknown")
    budget.taken["quick"] = 1.0
    assert budget.fits("quick")


@pytest.mark.thorough
def test_slow_cases_are_repeated_less(tmp_path):
    path = tmp_path / "slow.json"
    given = ["--json", str(path), *FLUX, "--batch", "1", "--restore", "full", "--repeat", "3"]
    assert end_to_end.main([*given, "--enough", "0"]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["repeats"] == row["repeats_stock"] == 1


@pytest.mark.thorough
def test_another_machine_or_code_needs_another_file(measured, tmp_path, capsys):
    path = tmp_path / "other.json"
    content = json.loads(measured.read_text())
    content["machine"]["gpu"] = "Some Other GPU"
    path.write_text(json.dumps(content))
    assert end_to_end.main(["--json", str(path), *FLUX]) == 2
    assert "Some Other GPU" in capsys.readouterr().err
    assert json.loads(path.read_text()) == content


@pytest.mark.thorough
def test_a_pipeline_without_an_adapter_is_skipped_and_its_stock_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.editor_bench.adapter_of", lambda pipe: None)
    path = tmp_path / "qwen.json"
    given = [*TINY, "--model", "qwen-image-edit", "--execution", "eager", "--batch", "1"]
    assert end_to_end.main(["--json", str(path), *given]) == 0
    out = capsys.readouterr().out
    assert out.count("qwen-image-edit: skipped, specedit.install does not support QwenImageEditPipeline") == 1
    content = json.loads(path.read_text())
    assert [m["case"]["preset"] for m in content["measurements"]] == [None] and content["rows"] == []


@pytest.mark.thorough
def test_failure_is_recorded_and_other_cases_run(tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("specedit.install", fail)
    path = tmp_path / "failed.json"
    assert end_to_end.main(["--json", str(path), *FLUX, "--batch", "1"]) == 1
    content = json.loads(path.read_text())
    assert len(content["measurements"]) == 1 and len(content["failures"]) == 2
    assert content["failures"][0]["error"] == "RuntimeError: out of"
    assert end_to_end.main(["--json", str(path), *FLUX, "--batch", "1"]) == 0  # not tried again unless asked to
    monkeypatch.undo()
    assert end_to_end.main(["--json", str(path), *FLUX, "--batch", "1", "--retry"]) == 0
    assert len(json.loads(path.read_text())["rows"]) == 2


def test_rows_compare_with_every_baseline_of_the_same_setting():
    def measurement(seconds, execution="eager", batch=1, **edit):
        case = dict(model="m", height=64, width=64, batch=batch, execution=execution, **edit)
        return dict(
            case=case, attention="native", seconds=seconds, first_seconds=9.0, peak_memory=7, edit_fraction=0.1,
            flops_ratio=4.0, stages=[],
        )  # fmt: skip

    edit = dict(preset="turbo", restore="full", share=0.1, shape="blob")
    rows = end_to_end.rows(
        [measurement([8.0, 10.0, 9.0]), measurement([6.0], "compiled"), measurement([20.0], batch=4),
         measurement([3.0, 2.0, 4.0], **edit)]
    )  # fmt: skip
    assert [(r["baseline"].split(", ")[1], r["speedup"], r["quotient"]) for r in rows] == [
        ("eager", 3.0, 0.75), ("compiled", 2.0, 0.5),
    ]  # fmt: skip
    assert rows[0]["spread"] == 2.0 and rows[0]["spread_stock"] == 2.0 and rows[1]["spread_stock"] == 0.0


def test_cases_are_unique_and_stock_comes_first():
    args = end_to_end.parse(["--json", "x"])
    wanted = list(end_to_end.cases(args))
    assert len(wanted) == len(set(wanted)) == 2 * 3 * 2 * 2 * (1 + (4 * 2 + 1) * 4 * 2)
    assert {c.share for c in wanted if c.preset} == {0.05, 0.1, 0.2, 0.4, 1.0}
    seen = set()
    for case in wanted:
        seen |= {(case.setting, case.execution)} if case.preset is None else set()
        assert (case.setting, case.execution) in seen
    assert wanted[0] == Case("flux-kontext", 1024, 1024, 1, "eager")


@pytest.mark.thorough
def test_presets_with_other_fields_are_cases_of_their_own(tmp_path):
    path, kept = tmp_path / "kept.json", "reference_refresh=2"
    given = ["--json", str(path), *FLUX, "--batch", "1", "--restore", "reference", "--changes", "", "--changes", kept]
    assert end_to_end.main(given) == 0
    plain, changed = json.loads(path.read_text())["rows"]
    assert (plain["changes"], changed["changes"]) == ("", kept)
    assert changed["flops_ratio"] > plain["flops_ratio"]


@pytest.mark.thorough
def test_cache_alone_runs_without_a_draft(tmp_path):
    path, cache = tmp_path / "cache.json", "steps=(0,0,50) forecast='reuse' forecast_interval=9"
    assert end_to_end.main(["--json", str(path), *FLUX, "--batch", "1", "--restore", "full", "--changes", cache]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    names = [stage["name"] for stage in row["stages"]]
    assert "draft" not in names and "full" in names and "mixed" not in names
    # Three full steps, then one in nine of the other 47: 8 of 50, and of a full step's last block not all is computed.
    assert 50 / 8 < row["flops_ratio"] * 50 / 4 < 50 / 6  # it is to stock's four steps


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--size", "1024"], "HEIGHTxWIDTH"), (["--size", "100x128"], "multiples of 16"), (["--share", "0"], "percentage"),
     (["--changes", "reference_refresh=0"], "reference_refresh: expected"), (["--changes", "refresh=2"], "not a field"),
     (["--changes", "restore=full"], "expected name=value"),
     (["--repeat", "0"], "at least 1"), (["--model", "flux"], "flux-kontext"), (["--share", "ten"], "percentage")],
)  # fmt: skip
def test_wrong_arguments(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        end_to_end.parse(["--json", "x", *arguments])
    assert stop.value.code == 2 and says in capsys.readouterr().err
