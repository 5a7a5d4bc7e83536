"""Pages and pictures of the real-size benchmark, made from result files that hold known figures."""

import importlib
import json
from pathlib import Path

import pytest
from PIL import Image

from specedit.evaluation.results import fingerprint

SCRIPTS = Path(__file__).parents[2] / "scripts"


def row(**change):
    return dict(
        model="flux-kontext", preset="turbo", restore="full", edit_fraction=0.2, height=1024, width=1024, batch=1,
        shape="blob", execution="eager", baseline="stock 50 steps, eager, native attention", seconds_stock=20.0,
        seconds=4.0, speedup=5.0, flops_ratio=6.25, spread=0.5, peak_memory_stock=100, peak_memory=102,
        stages=[dict(name="draft", seconds=1.0), dict(name="full", seconds=3.0)],
    ) | change  # fmt: skip


def write(folder, rows, name="end_to_end-real.json", **more):
    machine = dict(gpu="Some GPU", torch="2", diffusers="0", date="today")
    (folder / name).write_text(json.dumps(dict(machine=machine, command="the command", rows=rows, **more)))


def test_nothing_is_claimed_without_a_file(docs):
    for maker in ("real", "steps"):
        assert docs.MAKERS[maker]("end_to_end-real.json") == "*not measured yet*"


def test_the_faster_baseline_counts(docs, tmp_path):
    compiled = row(
        baseline="stock 50 steps, compiled, native attention", seconds_stock=16.0, speedup=4.0,
        peak_memory=None, peak_memory_stock=None,
    )  # fmt: skip
    write(tmp_path, [row(), compiled])
    text = docs.measured.real("end_to_end-real.json")
    (line,) = [line for line in text.splitlines() if line.startswith("| flux-kontext")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "flux-kontext", "1024 x 1024", "1", "turbo", "full", "20% blob", "16.00", "4.000 ± 0.250", "4.00", "6.25",
        "0.64", "3.50", "-", "7.05", "7.37",
    ]  # fmt: skip
    assert "stock 50 steps, compiled" in text and "stock 50 steps, eager" not in text
    assert "Some GPU" in text and "`the command`" in text


def test_every_file_has_its_table_and_only_its_papers_rows(docs, tmp_path):
    write(tmp_path, [row(restore="reference"), row(batch=4)])
    write(tmp_path, [row(model="qwen-image-edit", peak_memory=98)], "end_to_end-real-h200.json")
    lines = [
        line
        for line in docs.measured.real("end_to_end-real.json").splitlines()
        if line.startswith(("| flux", "| qwen"))
    ]
    assert [line.split("|")[-3:-1] for line in lines] == [[" 6.43 ", " 10.94 "], [" - ", " - "], [" - ", " - "]]
    assert "| -2.0% |" in lines[0] and "| +2.0% |" in lines[1]


def test_figures_are_drawn(docs, tmp_path):
    shares = [row(edit_fraction=share, restore=restore) for share in (0.1, 0.2) for restore in ("full", "reference")]
    write(tmp_path, shares)
    for draw in (docs.figures.clock_figure, docs.figures.stages_figure):
        draw("end_to_end-real.json", tmp_path / "figure.png")
        assert Image.open(tmp_path / "figure.png").size[0] > 400
        (tmp_path / "figure.png").unlink()
    write(tmp_path, [])
    docs.figures.clock_figure("end_to_end-real.json", tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()


def test_steps(docs, tmp_path):
    case = dict(model="flux-kontext", execution="eager", layout="fine", tokens=8704)
    write(tmp_path, [], "transformer-real.json", transformer=[dict(case=case, ms=250.0, tflops=661.6)])
    assert "| flux-kontext | eager | fine | 8,704 | 250.0 | 662 |" in docs.measured.steps("transformer-real.json")


def test_predictions_are_marked(docs):
    text = docs.predicted.roofline("plan.json")
    assert "Predicted, not measured" in text and "H100: 989 TFLOP/s, 3.35 TB/s" in text
    assert len([line for line in text.splitlines() if line.startswith("| qwen-image-edit")]) == 8


def test_kernels_on_a_cpu_claim_nothing_about_a_gpu(docs, tmp_path):
    assert docs.measured.kernels("kernels.json") == "*Not measured on a GPU yet.*"
    rows = [dict(op="gather_tokens", case="rows", provider="specedit_kernels", ms=1.0, gbps=8.0, of_roofline=0.5,
                 error=0.0)]  # fmt: skip
    machine = dict(gpu=None, cpu="Some CPU", threads=1, torch="2", diffusers="0", date="today")
    content = dict(machine=machine, command="the command", rows=rows)
    (tmp_path / "kernels-cpu.json").write_text(json.dumps(content))
    text = docs.measured.kernels("kernels.json")
    assert text.startswith("*Not measured on a GPU yet.*\n\n### On a CPU, small sizes")
    assert "Some CPU, 1 threads, no GPU" in text and "not the Triton kernels" in text and "Goals" not in text
    assert "| rows | specedit_kernels | 1.000 | 8.0 | 50% | 0.0e+00 |" in text
    assert "(images/kernels-cpu-gather_tokens.png)" in text
    write(tmp_path, rows, "kernels.json")
    text = docs.measured.kernels("kernels.json")
    assert "Not measured" not in text and "### Some GPU" in text and "Goals" in text
    assert "| gather_tokens | times PyTorch's fastest | 1.00 | - | - | - |" in text


def test_training_in_several_runs(docs, tmp_path):
    def log(name, *rows):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(list(rows)))
        return str(path)

    first = log("a", dict(part="vae", step=50, seconds=30), dict(part="vae", step=60, seconds=120, roundtrip_512=31.5))
    second = log("b", dict(part="editor", step=50, seconds=60), dict(part="editor", step=400, seconds=600))
    training_result = importlib.import_module("training_result")
    training_result.main([first, second, "--command", "one; two", "--folder", str(tmp_path)])
    text = docs.measured.training("micro-training.json")
    assert "| 1 | vae | 60 | 2 |" in text and "| 2 | editor | 400 | 10 |" in text
    assert "31.5 dB" in text and "`one; two` wrote" in text
    training_result.main([second, "--keep", "1", "--command", "one; other", "--folder", str(tmp_path)])
    third = log("c", dict(part="link", step=70, seconds=60))
    training_result.main([third, "--keep", "2", "--command", "and on", "--folder", str(tmp_path)])
    assert docs.measured.training("micro-training.json").splitlines()[2:6] == [
        "| 1 | vae | 60 | 2 |", "| 2 | editor | 400 | 10 |", "| 3 | link | 70 | 1 |", ""
    ]  # fmt: skip
    with pytest.raises(SystemExit, match=r"--keep: expected at most 3, the runs in .*micro-training.json, got 4"):
        training_result.main([third, "--keep", "4", "--command", "c", "--folder", str(tmp_path)])


def scored(variant, flops, **kinds):
    mean = dict(count=sum(kinds.values()), success=0.5, edit_psnr=18.0, keep_psnr=30.0, flops=flops, seconds=2.0)
    every = {name: dict(count=count, success=1.0, edit_psnr=20.0, keep_psnr=None) for name, count in kinds.items()}
    kind_of = [kind for kind, count in kinds.items() for _ in range(count)]
    cases = [dict(seed=seed, kind=kind, flops=flops, seconds=2.0) for seed, kind in enumerate(kind_of)]
    return dict(variant=variant, family="specedit", mean=mean, kinds=every, cases=cases)


def test_variants_are_ordered_by_cost_with_a_column_per_kind(docs, tmp_path):
    rows = [scored(name, flops, add=1, shape=3)
            for name, flops in (("turbo-full", 1e12), ("stock-10", 2e12), ("stock-50", 8e12))]  # fmt: skip
    write(tmp_path, rows, "quality-512.json")
    lines = docs.quality.quality("quality-512.json").splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:5]] == ["stock-50", "stock-10", "turbo-full"]
    assert lines[4].endswith("| 8.00 | 1.00 | 4.48 |")
    assert lines[0].endswith("| FLOPs ratio to 50 | clock ratio to 50 | FLOPs ratio to 28 |")
    lines = docs.quality.kinds("quality-512.json").splitlines()
    assert lines[0] == "| variant | add (1) | shape (3) |"
    assert lines[3] == "| stock-10 | 100%, 20.0, - | 100%, 20.0, - |"


def test_small_edits_are_chosen_by_the_task(docs, tmp_path):
    """By the task's mask, of every variant alike: what a variant found is another matter, nothing above all."""

    def case(seed, flops, found=None, **more):
        drafted = {} if found is None else dict(edit_fraction=found, flops_ratio=8e12 / flops)
        return (
            dict(seed=seed, kind="add", success=seed == 0, edit_psnr=20.0, keep_psnr=30.0 + seed, flops=flops)
            | drafted
            | more
        )

    rows = [
        scored("stock-50", 8e12, add=3) | dict(cases=[case(seed, 8e12) for seed in range(3)]),
        scored("turbo-reference", 1e12, add=3)
        | dict(
            cases=[
                case(0, 0.5e12, 0.1, mask_share=0.05, missed=0),
                case(1, 1.5e12, 1.0, mask_share=0.15, missed=1),  # nothing was found, so all of it was edited
                case(2, 0.5e12, 0.1, mask_share=0.9, missed=0),  # found small, and is not
            ]
        ),
    ]
    write(tmp_path, rows, "quality-512.json")
    lines = docs.quality.small_edits("quality-512.json").splitlines()
    assert lines[2] == "| stock-50 | 2 | - | - | 1.00 | 0.56 | 50.0% | 20.0 | 30.5 |"
    assert lines[3] == "| turbo-reference | 2 | 55.0% | 1 | 8.00 | 4.48 | 50.0% | 20.0 | 30.5 |"


@pytest.mark.slow
def test_curves_of_a_sweep_go_through_the_starting_point(docs, tmp_path, monkeypatch):
    def tried(group, psnr, **change):
        mean = dict(edit_psnr=psnr, texture_distance=2.0)
        cases = [dict(seed=0, kind="texture")]
        return dict(variant=f"{group} {change}", group=group, change=change, mean=mean, cases=cases)

    groups = [("threshold (draft)", dict(threshold="0.5")),
              ("threshold (full)", dict(verify_at="full", threshold="1.0")),
              ("dilation", dict(dilation="0")), ("uniform_stride", dict(uniform_stride="0")),
              ("draft_steps", dict(draft_steps="4")), ("boundaries", dict(boundaries="(0.9, 0.75)"))]  # fmt: skip
    rows = [tried("base", 20.0), *(tried(group, 21.0, **change) for group, change in groups)]
    write(tmp_path, rows, "sweep-256.json", base=dict(preset="turbo", draft_steps=8, boundaries=[0.7, 0.55]))
    lines, plot = [], docs.figures.Axes.plot
    monkeypatch.setattr(
        docs.figures.Axes, "plot", lambda axis, x, y, **how: lines.append((x, y)) or plot(axis, x, y, **how)
    )
    docs.figures.sweep_curves("sweep-256.json", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 500
    psnr = lines[::2]
    assert psnr[0] == ([0.7, 0.9], [20.0, 21.0])
    assert psnr[1] == ([0.2, 0.5], [20.0, 21.0]) and psnr[2] == ([1.0], [21.0])  # another place to compare at
    assert psnr[3:] == [([0, 1], [21.0, 20.0]), ([4, 8], [21.0, 20.0]), ([0, 3], [21.0, 20.0])]


def test_stock_flops_are_known_without_a_run(docs, tmp_path):
    write(tmp_path, [scored("student-8", 2e12, add=4)], "forecast-512.json", stock_flops=16e12)
    (line,) = [line for line in docs.quality.forecast("forecast-512.json").splitlines() if "student-8" in line]
    assert line == "| student-8 | 4 | 50.0% | 18.0 | 30.0 | 2.000 | 2.0 | 8.00 | - | 4.48 | - | - |"


def test_ratios_are_to_50_steps_and_to_the_pipelines_own_default(docs, tmp_path):
    rows = [scored("stock-50", 8e12, add=1), scored("stock-28", 4e12, add=1), scored("turbo-full", 1e12, add=1)]
    rows[1]["cases"][0]["seconds"] = 1.0
    write(tmp_path, rows, "quality-512.json")
    lines = docs.quality.quality("quality-512.json").splitlines()
    assert lines[0].endswith("| FLOPs ratio to 28 | clock ratio to 28 |")
    assert lines[4].endswith("| 8.00 | 1.00 | 4.00 | 0.50 |")  # of the row that ran them, not 28 / 50 of the other
    write(tmp_path, rows, "quality-qwen-512.json", of=dict(model="qwen"))
    lines = docs.quality.quality("quality-qwen-512.json").splitlines()
    assert lines[0].endswith("| FLOPs ratio to 50 | clock ratio to 50 |")  # which is Qwen's default


def test_predictions_show_both_ratios(docs):
    from specedit.cost.flops import plan

    run = plan("turbo", "flux-kontext", 1024, 1024, 0.1)
    text = docs.predicted.plan("plan.json")
    assert f"| turbo | {run['flops_ratio_50']:.2f} ({run['flops_ratio']:.2f}) |" in text
    assert "in brackets to 28, the pipeline's own default" in text


def test_command_records_its_result_file(docs):
    typed = importlib.import_module("docs_results").typed
    for command, ends in (
        ("python -m benchmarks.quality --cases 64", " --out benchmarks/results/q.json"),
        ("specedit bench --size 512", " --json benchmarks/results/q.json"),
        ("python -m training.micro.train --out runs/x", " --out runs/x"),
        ("python -m benchmarks.end_to_end --json q.json", " --json q.json"),
    ):
        assert typed(command, "q.json").endswith(ends) and typed(command, "q.json").startswith(command)


def test_page_says_when_weights_have_changed(docs):
    results = importlib.import_module("docs_results")
    folder = results.WEIGHTS / "kontext"
    for of in (
        {},
        dict(model="kontext", weights=fingerprint(folder)),
        dict(model="kontext", weights=fingerprint(folder / "vae")),
    ):
        assert results.age(dict(of=of)) == "" == results.age({})
    assert "changed since" in results.age(dict(of=dict(model="kontext", weights="0" * 12)))
    assert "changed since" in results.age(dict(of=dict(model="qwen", weights=fingerprint(folder))))


@pytest.mark.slow
def test_textures_have_columns_where_a_file_has_them(docs, tmp_path):
    def with_textures(variant, flops, **of_texture):
        row = scored(variant, flops, add=2)
        row["mean"] |= dict(count=5, texture_distance=1.234, material=0.5)
        row["kinds"]["texture"] = dict(count=3, texture_distance=1.234, material=0.5, keep_psnr=None) | of_texture
        case = dict(flops=flops, keep_psnr=30.0, mask_share=0.1)
        exact = dict(seed=0, kind="add", success=True, edit_psnr=20.0)
        texture = dict(seed=1, kind="texture", texture_distance=2.0, material=False)
        return row | dict(cases=[case | exact, case | texture])

    write(tmp_path, [with_textures("stock-50", 8e12), with_textures("turbo-full", 1e12)], "quality-512.json")
    lines = docs.quality.quality("quality-512.json").splitlines()
    assert lines[0].startswith("| variant | tasks | success | edit dB | texture | material | keep dB | TFLOPs |")
    assert lines[3].startswith("| turbo-full | 2 + 3 | 50.0% | 18.0 | 1.23 | 50% | 30.0 | 1.00 |")
    lines = docs.quality.kinds("quality-512.json").splitlines()
    assert lines[0] == "| variant | add (2) | texture (3) |"
    assert lines[3] == "| turbo-full | 100%, 20.0, - | 1.23, 50%, - |"
    lines = docs.quality.small_edits("quality-512.json").splitlines()
    assert lines[3].endswith("| 100.0% | 20.0 | 2.00 | 0% | 30.0 |")
    docs.figures.pareto("quality-512.json", tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").size[0] > 1300  # three panels


def test_the_curve_of_steps(docs, tmp_path):
    assert docs.MAKERS["texture-steps"]("texture-steps-256.json") == "*not measured yet*"
    rows = [
        dict(variant=f"stock-{n}", steps=n, mean=dict(count=12, texture_distance=d, material=0.5, seam=2.0), cases=[])
        for n, d in ((28, 1.2), (1, 3.0))
    ]
    write(tmp_path, rows, "texture-steps-256.json")
    lines = docs.MAKERS["texture-steps"]("texture-steps-256.json").splitlines()
    assert lines[0] == "| steps | tasks | texture | ratio to 28 | material | seam | keep dB |"
    assert lines[2:4] == ["| 1 | 12 | 3.00 | 2.50 | 50% | 2.00 | - |", "| 28 | 12 | 1.20 | 1.00 | 50% | 2.00 | - |"]


def test_a_session_is_shown_by_its_first_and_last_edit(docs, tmp_path):
    assert docs.MAKERS["session"]("session-256.json") == "*not measured yet*"
    rows = [
        dict(variant=variant, scene=scene, edit=edit, again=again, keep_psnr=keep, prompt_encodings=0 if again else 1,
             picture_encodings=0 if again else 1, seconds=2.0 if again else 3.0, success=scene == 1,
             haze_psnr=None if again or scene == 2 else keep + 5, untouched=None if again else 0.25 * (2 - scene))
        for variant, last in (("masked", 49.0), ("all pixels", 20.0))
        for scene in (1, 2)
        for edit, again, keep in ((1, False, 50.0), (10, False, last + scene), (10, True, 1.0))
    ]  # fmt: skip
    write(tmp_path, rows, "session-256.json", of=dict(model="kontext", size=256))
    lines = docs.MAKERS["session"]("session-256.json").splitlines()
    assert lines[0].startswith("| edits in a row | success | keep dB after 1 | keep dB after 10 | untouched |")
    untouched = "12% (1 of 2 scenes)"
    assert lines[2].startswith("| `keep_pixels`, the object's mask as `edit_mask` |")
    assert lines[2].endswith(f"| 50% | 50.0 | 50.5 | {untouched} | 55.0 | 55.0 | 0 |")
    assert lines[3] == f"| no kept pixels | 50% | 50.0 | 21.5 | {untouched} | 55.0 | 26.0 | 0 |"
    assert "2 of them, 256 px" in lines[5]


def test_main_loops_are_marked_as_predicted(docs, monkeypatch):
    docs_predicted = importlib.import_module("docs_predicted")
    loop = {"matrix": 8, "tensor": 256, "mufu": 34, "fma": 70, "barrier": 6, "all": 512}
    rows = [{"arch": "sm_90", "name": "attend", "main_loop": loop}, {"arch": "sm_90", "name": "none", "main_loop": {}}]
    monkeypatch.setattr(docs_predicted, "load", lambda name: {"machine": {"triton": "3.7"}, "rows": rows})
    text = docs_predicted.kernel_loops("kernel-loops.json")
    assert "| sm_90 | attend | 8 | 34 | 70 | 6 | 512 | 50% |" in text and "| none | 0 | 0 | 0 | 0 | 0 |  |" in text
    assert "Predicted, not measured" in text
    monkeypatch.setattr(docs_predicted, "load", lambda name: None)
    assert docs_predicted.kernel_loops("kernel-loops.json") == "*Not compiled yet.*"


def test_the_front_has_what_no_cheaper_row_is_as_good_as(docs):
    front = importlib.import_module("docs_methods").front
    rows = [(3.0, 0.9, "c"), (1.0, 0.5, "a"), (2.0, 0.5, "b"), (4.0, 0.7, "d")]
    assert [name for *_, name in front(rows, max)] == ["a", "c"]
    assert [name for *_, name in front(rows, min)] == ["a"]
