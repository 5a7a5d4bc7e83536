"""Which tasks and seconds of a result file are compared, from files that hold known figures."""

import importlib
import json
import math

import pytest
from matplotlib.figure import Figure

from tests.scripts.test_make_docs import write

ONE = dict(gpu=None, cpu="Old CPU", threads=2, torch="2", diffusers="0", date="today")
OTHER = ONE | dict(gpu="Some GPU", date="tomorrow")


@pytest.fixture
def cases(docs):
    return importlib.import_module("docs_cases")


def case(seed, seconds=1.0, machine=None, kind="add", flops=1e12, **more):
    scores = dict(texture_distance=2.0, material=True) if kind == "texture" else dict(success=True, edit_psnr=20.0)
    of = {} if machine is None else {"machine": machine}
    return dict(seed=seed, kind=kind, mask_share=0.1, keep_psnr=30.0, seconds=seconds, flops=flops) | scores | of | more


def row(variant, listed, **more):
    mean = dict(count=len(listed), success=1.0, edit_psnr=20.0, keep_psnr=30.0, flops=listed[0]["flops"], seconds=None)
    kinds = {one["kind"]: dict(count=1, success=1.0, edit_psnr=20.0, keep_psnr=30.0) for one in listed}
    return dict(variant=variant, mean=mean, kinds=kinds, cases=listed) | more


def textures(*seeds):
    return [case(seed, kind="texture") for seed in seeds]


def test_rows_of_the_same_tasks_are_as_in_the_file(cases, tmp_path):
    rows = [row("a", [case(0), case(1)]), row("b", [case(1), case(0)])]
    write(tmp_path, rows, "x.json")
    result = cases.compared("x.json")
    assert result["rows"] == rows and result["note"] == "" and cases.compared("none.json") is None


def test_rows_are_compared_on_the_tasks_that_all_have(cases, tmp_path):
    failed = case(3, success=False, edit_psnr=10.0, keep_psnr=None)
    rows = [row("a", [case(0), case(1), case(2), failed, *textures(9)]), row("b", [case(2), failed, *textures(9)])]
    write(tmp_path, rows, "x.json")
    result = cases.compared("x.json")
    a, b = result["rows"]
    assert b == rows[1] and [one["seed"] for one in a["cases"]] == [2, 3, 9]
    assert a["mean"].items() >= dict(count=3, success=0.5, edit_psnr=15.0, keep_psnr=30.0, flops=1e12).items()
    assert "seconds" not in a["mean"] and "success" not in a["kinds"]["texture"]
    assert a["kinds"]["add"]["count"] == 2 and a["kinds"]["texture"]["texture_distance"] == 2.0
    assert result["note"] == "Rows are compared on the 3 tasks that all of them have run."


@pytest.mark.parametrize(
    "few",
    [
        [case(0)],  # of four
        [case(0), case(1), case(2), case(3)],  # no texture
        [case(0), *textures(9)],  # one task of four
        [case(seed) for seed in (10, 11, 12)] + textures(9),  # none that others have
    ],
)
def test_a_row_that_would_leave_fewer_than_half_of_the_tasks_is_named_below_the_table(cases, tmp_path, docs, few):
    most = [case(seed) for seed in range(4)] + textures(9)
    write(tmp_path, [row("few", few), row("stock-28", most), row("b", most)], "x.json")
    result = cases.compared("x.json")
    assert [one["variant"] for one in result["rows"]] == ["stock-28", "b"]
    assert result["note"] == "Not run on enough tasks to compare: few."
    for maker in (docs.quality.quality, docs.quality.kinds, docs.quality.small_edits):
        text = maker("x.json")
        assert "| few |" not in text and "\n\nNot run on enough tasks to compare: few.\n\nMeasured on" in text


def test_two_halves_are_not_reduced_to_nothing(cases):
    a, b = row("a", [case(0), case(1), case(2)]), row("b", [case(0), case(1)])
    (first, second), left_out = cases.shared([row("c", [case(1), case(2)]), a, b])
    assert (first["variant"], second["variant"], left_out) == ("c", "a", ["b"])


def test_rows_without_a_common_task_are_left_out_even_where_any_number_is_enough(cases):
    rows, left_out = cases.shared([row("a", [case(0), case(1)]), row("b", [case(2)]), row("c", [case(1)])], enough=0.0)
    assert [(one["variant"], len(one["cases"])) for one in rows] == [("a", 1), ("c", 1)] and left_out == ["b"]
    machine = dict(gpu=None, cpu="A", threads=1)
    timed = [row("a", [case(0, 2.0)]), row("b", [case(1, 3.0)]), row("c", [case(0, None)])]
    assert cases.mean_seconds(dict(machine=machine, rows=timed))[0] == {"a": 2.0}


def test_clock_ratios_pair_tasks_within_a_machine(cases):
    baseline = [case(0, 8.0), case(1, 4.0), case(2, 100.0, 1), case(3, 50.0, 1), case(4, None)]
    own = [case(0, 2.0), case(1, 1.0), case(2, 5.0), case(3, 5.0, 1), case(4, 1.0)]  # 2 on another, 4 not timed
    assert cases.clock_ratio(baseline, own) == pytest.approx((4.0**2 * 10.0) ** (1 / 3))
    assert cases.clock_ratio(own, baseline) == pytest.approx(1 / cases.clock_ratio(baseline, own))
    assert cases.clock_ratio(baseline[:2], own[:2]) == pytest.approx(12 / 3)  # of sums
    assert cases.clock_ratio(baseline[2:3], own) is None is cases.clock_ratio(baseline[4:], own)


def test_mean_seconds_are_of_one_machine_and_the_same_tasks(cases):
    rows = [
        row("a", [case(0, 2.0, 0), case(1, 4.0, 0), case(2, 100.0, 1)]),
        row("b", [case(0, 1.0, 0), case(1, None, 0), case(2, 2.0, 0)]),
        row("c", [case(0, 50.0, 1), case(1, 50.0, 1), case(2, 50.0, 1)]),
    ]
    result = dict(machine=OTHER, machines=[ONE, OTHER], rows=rows)
    assert cases.mean_seconds(result) == ({"a": 2.0, "b": 1.0}, 1, ", on Old CPU, 2 threads, no GPU")
    rows[1]["cases"][1]["seconds"] = 3.0
    assert cases.mean_seconds(result)[:2] == ({"a": 3.0, "b": 2.0}, 2)
    assert cases.mean_seconds(dict(machine=ONE, rows=rows[:1])).machine == ""
    for one in rows:
        one["cases"] = [case(0, None)]
    assert cases.mean_seconds(result) == ({}, 0, "")


@pytest.fixture
def two(docs, tmp_path):
    """A file of two machines, the second ten times slower; `ran` writes the seconds of a variant's tasks."""

    def ran(variant, seconds, flops, **more):
        listed = [case(i, s, m, flops=flops) for i, (s, m) in enumerate(seconds)]
        return row(variant, listed, group="stock" if "stock" in variant else "idea", **more)

    rows = [
        ran("stock-28", [(4.0, 0), (4.0, 0), (40.0, 1)], 28e12, steps=28),
        ran("fast", [(2.0, 0), (2.0, 0), (10.0, 1)], 4e12, preset="fast", restore="full", nfe=28),
        ran("late", [(30.0, 1), (30.0, 1), (None, 0)], 4e12, preset="turbo", restore="full", nfe=28),
    ]
    write(tmp_path, rows, "quality-512.json")
    file = tmp_path / "quality-512.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(machine=OTHER, machines=[ONE, OTHER])))
    return docs


def cells(text, variant):
    (line,) = [line for line in text.splitlines() if line.startswith("| ") and variant in line.split("|")[1]]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_table_names_the_machines_and_never_mixes_their_seconds(two):
    ratio = f"{math.cbrt(2 * 2 * 4):.2f}"
    quality, methods, gains = (two.MAKERS[name](f"quality{of}.json")
                               for name, of in (("quality", "-512"), ("methods", "-512"), ("gains", "")))  # fmt: skip
    for text in (quality, methods, gains):
        assert "Old CPU, 2 threads, no GPU" in text and "Some GPU" in text
    assert cells(quality, "fast")[-2:] == ["7.00", ratio] and cells(quality, "late")[-2:] == ["7.00", "-"]
    # In the table of methods the ratio is that of the seconds beside it.
    assert cells(methods, "fast")[8:11] == ["7.00", "2.0", "2.00"]
    assert cells(methods, "late")[8:11] == ["7.00", "-", "-"]
    assert "\n\nSeconds and their ratios are of 2 tasks, on Old CPU, 2 threads, no GPU.\n\n" in methods
    assert cells(gains, "fast")[4:6] == ["7.00", ratio] and cells(gains, "turbo")[4:6] == ["7.00", "-"]
    measured = "Measured on Old CPU, 2 threads, no GPU; torch 2, diffusers 0, today; and on Some GPU; torch 2, "
    assert measured + "diffusers 0, tomorrow. `the command` wrote" in quality
    assert "Measured on Some GPU" in two.MAKERS["gpu-state"]("")


def test_machines_of_one_kind_are_named_once(two):
    machine = dict(gpu=None, cpu="A CPU", threads=1, torch="2", diffusers="0", date="today")
    shown = importlib.import_module("docs_results").source(
        {"machine": machine, "machines": [machine, dict(machine), machine | {"date": "later"}], "command": "c"},
        "x.json",
    )
    assert shown.count("A CPU") == 2 and shown.count("today") == 1


def test_a_merged_file_names_every_command_once(two):
    machine = dict(gpu=None, cpu="A CPU", threads=1, torch="2", diffusers="0", date="today")
    command = "; ".join(f"python -m benchmarks.methods --cases {count}" for count in (8, 64, 8))
    shown = importlib.import_module("docs_results").source(dict(machine=machine, command=command), "x.json")
    assert shown.endswith(
        "`python -m benchmarks.methods --cases 8` and `python -m benchmarks.methods --cases 64`, each with its own "
        "`--out` and joined by `python -m benchmarks.merge`, wrote `benchmarks/results/x.json`."
    )


def test_figure_over_the_clock_has_points_of_one_machine(two, tmp_path, monkeypatch):
    axes = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: axes.extend(figure.axes))
    importlib.import_module("docs_methods").pareto("quality-512.json", tmp_path / "x.png")
    drawn = {axis.get_xlabel(): [tuple(map(list, line.get_data())) for line in axis.get_lines()] for axis in axes}
    assert drawn["seconds an edit, 2 tasks, on Old CPU, 2 threads, no GPU"] == [([4.0], [1.0]), ([2.0], [1.0])]
    assert drawn["TFLOPs an edit"] == [([28.0], [1.0]), ([4.0, 4.0], [1.0, 1.0])]


def test_without_a_clock_tables_have_dashes(docs, tmp_path, monkeypatch):
    rows = [
        row("stock-50", [case(0, None)], group="base", family="stock", change={}, steps=50),
        row("turbo", [case(0, None, flops=2e11)], group="idea", family="specedit", change={"x": "1"}, nfe=9),
    ]
    for one in rows:
        one["mean"] |= dict(flops_ratio=1.0, recall=None, precision=None)
    write(tmp_path, rows, "x.json", of=dict(model="qwen"))
    assert cells(docs.quality.quality("x.json"), "turbo")[-2:] == ["5.00", "-"]
    assert cells(docs.quality.forecast("x.json"), "turbo")[6:9] == ["-", "5.00", "-"]
    assert cells(docs.quality.sweep("x.json"), "turbo")[6:] == ["-", "-", "-"]
    rows[0]["group"] = "stock"
    write(tmp_path, rows, "x.json", of=dict(model="qwen"))
    assert cells(docs.MAKERS["methods"]("x.json"), "turbo")[8] == "-"
    importlib.import_module("docs_methods").pareto("x.json", tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()
