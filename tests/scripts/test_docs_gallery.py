"""The gallery's page and the table of presets."""

import json

from specedit.cost.flops import plan


def write(folder, model, ratio):
    row = dict(task="add", prompt="add a star", nfe=9, draft_steps=4, edit_fraction=0.25, keep_psnr=31.06)
    rows = [
        row | dict(variant="stock, 28 steps", nfe=28, draft_steps=0, flops_ratio=1.0, edit_fraction=1.0),
        row | dict(variant="turbo, reference", flops_ratio=ratio),
        row | dict(variant="ultra, reference", flops_ratio=ratio, keep_psnr=None),
    ]
    machine = dict(gpu=None, cpu="Some CPU", threads=1, torch="2", diffusers="0", date="today")
    of = dict(model=model, size=256)
    text = json.dumps(dict(machine=machine, command="python -m benchmarks.gallery", of=of, rows=rows))
    (folder / f"gallery-{model}.json").write_text(text)


def test_a_task_has_a_picture_of_each_editor_and_one_table(docs, tmp_path):
    assert docs.MAKERS["gallery"]("gallery.json") == "*not measured yet*"
    write(tmp_path, "kontext", 7.125)
    write(tmp_path, "qwen", 13.5)
    text = docs.MAKERS["gallery"]("gallery.json")
    assert text.startswith("## Add a star\n")
    assert "](images/gallery-kontext-add.jpg)" in text and "](images/gallery-qwen-add.jpg)" in text
    assert "| stock, its own steps | 28 | 1.00 | 100% | 31.1 | 28 | 1.00 | 100% | 31.1 |" in text
    assert "| turbo, reference | 9 + 4 | 7.12 | 25% | 31.1 | 9 + 4 | 13.50 | 25% | 31.1 |" in text
    assert "| ultra, reference | 9 + 4 | 7.12 | 25% | - |" in text
    assert text.count("Some CPU") == 2


def test_presets_are_compared_with_each_models_own_steps(docs):
    text = docs.MAKERS["choosing"]("plan.json")
    rows = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")}
    header, kontext, klein = (rows[f"| {name}"] for name in ("model", "FLUX.1-Kontext", "FLUX.2-klein, 9B"))
    balanced = plan("balanced", "flux-kontext", 1024, 1024, 0.2)["flops_ratio"]
    assert kontext[header.index("`balanced`")].startswith(f"{balanced:.1f} / ")
    assert kontext[header.index("`few-4`")] == "-" == klein[header.index("`balanced`")]
    assert float(klein[header.index("`few-4`")]) > 1
    assert "/" not in kontext[header.index("`ultra`")]  # it brings its restore
