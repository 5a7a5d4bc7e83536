"""The table and figure of all methods, made from a result file that holds known figures."""

import importlib
import json

import pytest
from matplotlib.figure import Figure
from PIL import Image


def case(seed, kind, **scores):
    return dict(seed=seed, kind=kind, mask_share=0.1, keep_psnr=30.0, seconds=1.0, flops=1e12) | scores


def row(variant, group, flops, seconds, **more):
    cases = [
        case(0, "add", success=True, edit_psnr=20.0, flops=flops, seconds=seconds),
        case(1, "add", success=False, edit_psnr=10.0, flops=flops, seconds=seconds),
        case(2, "texture", texture_distance=1.25, material=True, flops=flops, seconds=seconds),
    ]
    return dict(variant=variant, group=group, mean=dict(flops=flops, seconds=seconds), kinds={}, cases=cases, **more)


@pytest.fixture
def result(docs, tmp_path):
    """The module, and a file with three rows, one of which has not run every task."""
    rows = [
        row("steps", "specedit", 2e12, 2.0, nfe=4, cache_bytes=3_000_000),
        row("stock-50", "stock", 50e12, 50.0, steps=50), row("stock-28", "stock", 28e12, 28.0, steps=28),
        row("half", "method", 1e12, 1.0, nfe=5),
    ]  # fmt: skip
    rows[-1]["cases"].pop()
    machine = dict(gpu=None, cpu="Some CPU", threads=2, torch="2", diffusers="0", date="today")
    (tmp_path / "methods-64.json").write_text(json.dumps(dict(machine=machine, command="the command", rows=rows)))
    return importlib.import_module("docs_methods")


def test_the_table_has_both_metrics_and_what_the_method_itself_brings(result):
    text = result.methods("methods-64.json")
    assert text.startswith("Tasks: 2, and 1 of textures.")
    assert "\n\nNot run on enough tasks to compare: half.\n\nMeasured on" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [line[0] for line in cells] == ["variant", "stock-50", "stock-28", "steps"]
    own = dict(zip(cells[0], cells[-1], strict=True))
    assert (own["success"], own["edit dB"], own["texture distance"], own["material"]) == ("50%", "15.0", "1.25", "100%")
    assert (own["FLOPs ratio to 50"], own["FLOPs ratio to 28"], own["clock ratio to 28"]) == ("25.00", "14.00", "14.00")
    assert own["FLOPs ratio to stock with as many steps"] == "2.00"  # 4 stock steps take 4e12, this run 2e12
    assert (own["seconds"], own["kept by caches, MB"], "peak memory, MB" in own) == ("2.0", "3", False)


def test_seconds_are_of_the_tasks_that_every_row_was_timed_on(result, tmp_path):
    file = next(tmp_path.rglob("methods-64.json"))
    content = json.loads(file.read_text())
    for each in content["rows"]:
        each["cases"] = [case(seed, "add", success=True, edit_psnr=20.0, seconds=float(seed)) for seed in range(1, 4)]
    for timed in content["rows"][-1]["cases"][:2]:
        timed["seconds"] = None
    file.write_text(json.dumps(content))
    text = result.methods("methods-64.json")
    assert "\n\nSeconds and their ratios are of 1 tasks.\n\n" in text
    header, *lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [line[header.index("seconds")] for line in lines] == ["3.0"] * 4
    assert [line[header.index("clock ratio to 28")] for line in lines] == ["1.00"] * 4


@pytest.mark.parametrize(("count", "named"), [(2, True), (3, False)])
def test_half_of_the_tasks_would_make_the_main_table_coarse(result, tmp_path, monkeypatch, count, named):
    """And that of kinds and the figure, which stand beside it."""
    file = next(tmp_path.rglob("methods-64.json"))
    content = json.loads(file.read_text())
    for each in content["rows"]:
        ran = count if each["variant"] == "half" else 4
        each["cases"] = [case(seed, "add", success=True, edit_psnr=20.0) for seed in range(ran)]
    file.write_text(json.dumps(content))
    text = result.methods("methods-64.json")
    assert ("Not run on enough tasks to compare: half." in text) == named
    assert text.startswith(f"Tasks: {4 if named else 3}.") and "| half |" in result.all_methods("methods-64.json")
    kinds = importlib.import_module("docs_quality").kinds("methods-64.json")
    assert ("Not run on enough tasks to compare: half." in kinds) == named
    axes = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: axes.extend(figure.axes))
    result.pareto("methods-64.json", tmp_path / "x.png")
    drawn = {line.get_label() for axis in axes for line in axis.get_lines()}
    assert drawn == {"stock", "specedit"} | (set() if named else {"method"})


def test_ablations_stand_in_the_order_of_their_paper(result, tmp_path):
    changes = importlib.import_module("benchmarks.ablations").CHANGES
    file = next(tmp_path.rglob("methods-64.json"))
    content = json.loads(file.read_text()) | dict(rows=[row(name, "method", 1e12, 1.0) for name in sorted(changes)])
    for each in content["rows"]:
        if each["variant"] in ("edges", "random"):
            each["cases"][2]["texture_distance"] = 2.5 if each["variant"] == "random" else 1.0
    file.write_text(json.dumps(content))
    text = result.ablations("methods-64.json")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    names, rewards = [line[0] for line in lines[1:]], [float(line[-1]) for line in lines[1:]]
    assert names == list(changes) and rewards == sorted(rewards, reverse=True)
    own = dict(zip(lines[0], lines[1 + names.index("random")], strict=True))
    assert (own["success"], own["edit dB"], own["texture distance"]) == ("50%", "15.00", "2.50")
    farther = {line[0]: line[lines[0].index("textures farther than in full")] for line in lines[1:]}
    assert farther == {name: "0 of 1" for name in changes} | {"full": "-", "random": "1 of 1"}


def test_ablations_that_have_not_run_are_left_out(result, tmp_path):
    file = next(tmp_path.rglob("methods-64.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(rows=[row("edges", "method", 1e12, 1.0)])))
    _, line = [line.split(" | ") for line in result.ablations("methods-64.json").splitlines() if line.startswith("| ")]
    assert line[0] == "| edges" and line[-2] == "-"


def test_a_gpus_peak_memory_is_shown_in_the_place_of_what_caches_keep(result, tmp_path):
    file = next(tmp_path.rglob("methods-64.json"))
    content = json.loads(file.read_text())
    for each in content["rows"]:
        each["mean"]["peak_memory"] = each["mean"]["flops"] / 1e5
    file.write_text(json.dumps(content))
    header, *lines = [line for line in result.methods("methods-64.json").splitlines() if line.startswith("| ")]
    at = header.split(" | ").index("peak memory, MB")
    assert [line.split(" | ")[at] for line in lines] == ["500", "280", "20"] and "caches" not in header


def test_every_variant_stands_in_a_table_of_the_tasks_that_all_have(result):
    text = result.all_methods("methods-64.json")
    assert text.startswith("Tasks: 2.") and "Rows are compared on the 2 tasks that all of them have run." in text
    names = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert names == ["| variant", "| stock-50", "| stock-28", "| half", "| steps"]
    header, *lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [line[header.index("seconds")] for line in lines] == ["50.0", "28.0", "1.0", "2.0"]


def test_without_a_file_nothing_is_claimed(result):
    assert result.methods("methods-none.json") == "*not measured yet*"


def test_the_figure_is_drawn(result, tmp_path):
    result.pareto("methods-64.json", tmp_path / "figure.png")
    assert min(Image.open(tmp_path / "figure.png").size) > 500


@pytest.mark.slow
def test_what_was_not_judged_or_timed_has_no_panel(result, tmp_path):
    result.pareto("methods-64.json", tmp_path / "whole.png")
    file = next(tmp_path.rglob("methods-64.json"))
    content = json.loads(file.read_text())
    for each in content["rows"]:
        each["cases"] = [one | {"seconds": None} for one in each["cases"] if one["kind"] != "texture"]
    file.write_text(json.dumps(content))
    result.pareto("methods-64.json", tmp_path / "part.png")
    whole, part = (Image.open(tmp_path / f"{name}.png").size for name in ("whole", "part"))
    assert part == (whole[0] // 2, whole[1] // 2)
