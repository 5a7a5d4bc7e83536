"""Rows through Ray Data: the class for `map_batches`, and a local cluster that loses an actor."""

import io
import json
import os
import signal
import threading
import time

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from specedit import cli, pipelines
from specedit.batch.jobs import Job
from specedit.batch.results import FILE, JOURNAL
from specedit.integrations import ray as integration
from specedit.integrations.ray import Editor

GREY = "make it greyscale"
QUICK = ("--preset", "turbo", "--steps", "2")


class Inverts:
    def __call__(self, image, prompt, generator=None, edit_mask=None, **more):
        self.heard = more | {"edit_mask": edit_mask}
        return type("Output", (), {"images": [Image.eval(image, lambda value: 255 - value)]})


@pytest.fixture
def pipe(monkeypatch):
    pipe = Inverts()
    monkeypatch.setattr(pipelines, "load", lambda *_, **__: (pipe, lambda image: (image, {})))
    monkeypatch.setattr("specedit.api.installing.install", lambda pipe, config, **_: None)
    return pipe


def column(*values):
    made = np.empty(len(values), dtype=object)
    made[:] = values
    return made


def test_editor_takes_files_bytes_and_arrays_and_passes_other_columns_through(pipe, tmp_path):
    picture = Image.new("RGB", (48, 32), (1, 2, 3))
    picture.save(tmp_path / "a.png")
    held = io.BytesIO()
    picture.save(held, "PNG")
    batch = {
        "image": column(str(tmp_path / "a.png"), held.getvalue(), np.asarray(picture), "gone.png"),
        "prompt": np.array([GREY, GREY, "Make it gray", GREY]), "page": np.arange(4), "seed": np.array([5, 6, 7, 8]),
    }  # fmt: skip
    found = Editor(preset="turbo", folder=tmp_path)(batch)
    assert list(found["status"]) == ["done"] * 3 + ["error"] and "gone.png" in found["error"][3]
    assert list(found["page"]) == [0, 1, 2, 3] and list(found["seed"][:3]) == [5, 6, 7]
    edits = [Image.open(io.BytesIO(edited)) for edited in found["edited"][:3]]
    assert all(edit.getcolors() == [(48 * 32, (254, 253, 252))] for edit in edits) and found["edited"][3] is None
    assert '"gray" is read as "grey"' in found["notes"][2] and len(set(found["id"])) == 4


def test_editor_writes_into_a_folder_and_takes_a_mask_in_memory(pipe, tmp_path):
    mask = np.zeros((32, 48), np.uint8)
    mask[:16] = 255
    batch = {"image": column(np.zeros((32, 48, 3), np.uint8)), "prompt": column(GREY), "mask": column(mask),
             "id": column("a"), "settings": column('{"steps": 3}')}  # fmt: skip
    found = Editor(out=tmp_path)(batch)
    assert found["output"][0] == str(tmp_path / "a.png") and "edited" not in found
    assert Image.open(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    assert pipe.heard["num_inference_steps"] == 3 and np.array_equal(pipe.heard["edit_mask"], mask)


def test_an_editor_that_lost_its_device_ends_its_process(pipe, monkeypatch):
    def ended(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", ended)
    monkeypatch.setattr(Inverts, "__call__", lambda *_, **__: 1 / 0)
    batch = {"image": column(np.zeros((32, 48, 3), np.uint8)), "prompt": column(GREY)}
    assert Editor()(batch)["error"][0] == "division by zero"

    def broken(*_, **__):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(Inverts, "__call__", broken)
    with pytest.raises(SystemExit):
        Editor()(batch)


def test_a_row_that_kills_its_workers_is_given_up_and_its_neighbours_run(pipe, monkeypatch, tmp_path):
    call = Inverts.__call__

    def dies(self, image, **more):
        if image.getpixel((0, 0)) == (0, 0, 0):
            raise KeyboardInterrupt  # as a process that ends: nothing after it runs
        return call(self, image, **more)

    monkeypatch.setattr(Inverts, "__call__", dies)
    pictures = column(np.zeros((32, 48, 3), np.uint8), np.ones((32, 48, 3), np.uint8))
    batch = {"image": pictures, "prompt": column(GREY, GREY), "id": column("deadly", "fine")}
    for _ in range(integration.TRIES):
        with pytest.raises(KeyboardInterrupt):
            Editor(out=tmp_path)(batch)
    found = Editor(out=tmp_path)(batch)
    assert list(found["status"]) == ["error", "done"] and "3 workers that died of this row" in found["error"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["fine.png"]


def test_blocks_hold_one_layout_and_leave_no_actor_idle():
    sizes = [(64, 64)] * 5 + [(64, 96)] * 11
    jobs = [Job(n, str(n), "", "a.png", GREY, None, f"{n}.png", layout=size) for n, size in enumerate(sizes)]
    made = list(integration.parts(jobs, 8, actors=2))
    assert [len(part) for part in made] == [4, 1, 4, 4, 3] and [job for part in made for job in part] == jobs
    assert all(len({job.layout for job in part}) == 1 for part in made)
    assert [len(part) for part in integration.parts(jobs[:1], 8, actors=2)] == [1]


def kill_first_worker(out):
    """Kills the actor that the first result names, and returns its process id."""
    killed = []

    def watch():
        journal = out / JOURNAL
        while not killed:
            lines = journal.read_text().splitlines() if journal.exists() else []
            done = [json.loads(line) for line in lines if 'error": null' in line and line.endswith("}")]
            pids = [int(result["worker"].rpartition(":")[2]) for result in done]
            if others := [pid for pid in pids if pid != os.getpid()]:
                os.kill(others[0], signal.SIGKILL)
                killed.append(others[0])
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return killed, thread


@pytest.mark.thorough
@pytest.mark.long
def test_an_actor_that_is_killed_is_replaced_and_no_row_is_lost_or_doubled(tmp_path, monkeypatch, capsys):
    """Two actors on a real local Ray go on with a run in process; one dies after the first result. Every row has one
    result, as in process."""
    pytest.importorskip("ray.data", reason="needs Ray Data")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default all other processes come first
    lines = []
    for number in range(12):
        size = (64, 64) if number % 2 else (64, 96)
        Image.new("RGB", size, (20 * number, 99, 7)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"id": str(number), "image": f"{number}.png", "prompt": GREY}))
    lines.append(json.dumps({"id": "bad", "image": "gone.png", "prompt": GREY}))
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(lines))
    out, plain = tmp_path / "out", tmp_path / "plain"
    begun = tmp_path / "begun.jsonl"
    begun.write_text("\n".join(lines[:4]))
    assert cli.main(["batch", str(begun), "--out", str(out), *QUICK]) == 0
    capsys.readouterr()
    killed, thread = kill_first_worker(out)
    assert cli.main(["batch", str(source), "--out", str(out), *QUICK, "--ray", "--actors", "2"]) == 3
    thread.join(timeout=1)
    said = capsys.readouterr()
    assert killed and "specedit: bad: image: expected" in said.err and "4 of them done before" in said.out
    found = {row["id"]: row for row in parquet.read_table(out / FILE).to_pylist()}
    assert list(found) == [*map(str, range(12)), "bad"] and found["bad"]["status"] == "error"
    assert all(found[str(n)]["status"] == "done" for n in range(12)), found
    workers = {found[str(n)]["worker"] for n in range(4, 12)}
    assert len(workers) >= 2 and any(not worker.endswith(f":{killed[0]}") for worker in workers)
    assert sorted(path.name for path in out.iterdir()) == sorted([*(f"{n}.png" for n in range(12)), FILE])
    assert cli.main(["batch", str(source), "--out", str(plain), *QUICK]) == 3
    for n in range(12):
        assert np.array_equal(Image.open(out / f"{n}.png"), Image.open(plain / f"{n}.png"))
    assert cli.main(["batch", str(source), "--out", str(out), *QUICK]) == 3
    assert "12 of them done before" in capsys.readouterr().out
