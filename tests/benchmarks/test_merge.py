"""Files made side by side become one, unless they hold scores of something else."""

import copy
import json

import pytest

from benchmarks import merge

MACHINE = dict(cpu="A", threads=1, torch="2.13.0", diffusers="0.42.1", commit="c", date="2026-01-01")
SETTINGS = dict(group="stock", steps=50)


def case(seed, **more):
    return dict(seed=seed, kind="add", success=True, edit_psnr=20.0 + seed, keep_psnr=None, seconds=1.0) | more


def content(**rows):
    """A file's content; rows: the cases by variant."""
    listed = [dict(variant=name, **SETTINGS, mean={}, kinds={}, cases=cases) for name, cases in rows.items()]
    return dict(machine=MACHINE, command="python -m benchmarks.methods", of=dict(size=64), rows=listed)


@pytest.fixture
def join(tmp_path):
    """Merges contents by the command."""

    def run(*contents, options=()):
        files = [tmp_path / f"{i}.json" for i in range(len(contents))]
        for file, one in zip(files, contents, strict=True):
            file.write_text(json.dumps(one))
        merge.main([*map(str, files), "--out", str(tmp_path / "out.json"), *options])
        return json.loads((tmp_path / "out.json").read_text())

    return run


def test_tasks_and_variants_are_united_and_keep_their_machines(join):
    later = content(stock=[case(1), case(0, seconds=9.0)], turbo=[case(1)]) | dict(
        machine=MACHINE | {"date": "2026-02"}
    )
    joined = join(content(stock=[case(2), case(0)]), later, content(ultra=[case(0)]))
    rows = {row["variant"]: row for row in joined["rows"]}
    assert list(rows) == ["stock", "turbo", "ultra"] and rows["turbo"].items() >= SETTINGS.items()
    kept = [(one["seed"], one["machine"], one["seconds"]) for one in rows["stock"]["cases"]]
    assert kept == [(0, 0, 1.0), (1, 1, 1.0), (2, 0, 1.0)]
    mean = rows["stock"]["mean"]
    assert (mean["count"], mean["edit_psnr"], mean["seconds"], mean["keep_psnr"]) == (3, 21.0, None, None)
    assert rows["turbo"]["mean"]["seconds"] == 1.0 and rows["turbo"]["kinds"]["add"]["count"] == 1
    assert joined["machines"] == [MACHINE, later["machine"], MACHINE] and joined["machine"] == later["machine"]
    assert joined["command"] == "python -m benchmarks.methods" and joined["of"] == dict(size=64)


def test_the_largest_cache_is_kept(join):
    files = [content(stock=[case(0)]), content(stock=[case(1)]), content(stock=[case(2)])]
    for file, held in zip(files, (0, 7, 3)):
        file["rows"][0]["cache_bytes"] = held
    assert join(*files)["rows"][0]["cache_bytes"] == 7


def test_a_copy_adds_no_machine(join):
    first = content(stock=[case(0), case(1)])
    joined = join(first, content(stock=[case(0)]))
    assert list(joined) == list(first) and joined["rows"][0]["cases"] == first["rows"][0]["cases"]
    grown = copy.deepcopy(joined) | dict(machines=[MACHINE, MACHINE | {"cpu": "B"}])
    for one in grown["rows"][0]["cases"]:
        one["machine"] = 0
    grown["rows"][0]["cases"].append(case(2, machine=1))
    joined = join(first, grown)
    assert [one["cpu"] for one in joined["machines"]] == ["A", "B"]
    assert [one["machine"] for one in joined["rows"][0]["cases"]] == [0, 0, 1]


def test_scores_may_differ_by_rounding(join):
    joined = join(content(stock=[case(0)]), content(stock=[case(0, edit_psnr=20.001)]))
    assert joined["rows"][0]["cases"][0]["edit_psnr"] == 20.0
    with pytest.raises(SystemExit, match=r"stock, task 0: expected {'edit_psnr': 20\.0}, got {'edit_psnr': 20\.1}"):
        join(content(stock=[case(0)]), content(stock=[case(0, edit_psnr=20.1)]))
    with pytest.raises(SystemExit, match=r"stock, task 0: expected {'flops': 1000.0}, got {'flops': 1000.1}"):
        join(content(stock=[case(0, flops=1000.0)]), content(stock=[case(0, flops=1000.1)]))


def test_files_of_one_machine_share_their_seconds(join):
    later = content(stock=[case(1, seconds=3.0)]) | dict(machine=MACHINE | {"date": "2026-02", "commit": "d"})
    joined = join(content(stock=[case(0)]), later, options=["--one-machine"])
    assert "machines" not in joined and joined["machine"] == later["machine"]
    assert joined["rows"][0]["mean"]["seconds"] == 2.0 and "machine" not in joined["rows"][0]["cases"][0]
    with pytest.raises(SystemExit, match=r"^merge: --one-machine: expected one kind of machine, got .*'A'.*'B'"):
        join(content(stock=[case(0)]) | dict(machine=MACHINE | {"cpu": "B"}), later, options=["--one-machine"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(of=dict(size=512)), "holds scores of {'size': 512}, expected {'size': 64}"),
        (dict(machine=MACHINE | {"torch": "2.12.0"}), "holds scores of {'torch': '2.12'.*, expected {'torch': '2.13'"),
        (dict(base=1), "the file: expected {'base': None}, got {'base': 1}"),
        (content(stock=[case(0, success=False)]), "stock, task 0: expected {'success': True}, got {'success': False}"),
        (dict(rows=[dict(variant="stock", group="idea", cases=[])]), "stock: expected {'group': 'stock', 'steps': 50}"),
    ],
)
def test_scores_that_differ_are_not_merged(join, change, message):
    with pytest.raises(SystemExit, match=rf"^merge: .*1\.json: {message}"):
        join(content(stock=[case(0)]), content(stock=[case(0)]) | change)
