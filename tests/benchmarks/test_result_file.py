"""Result files of one machine are read and written as they were before files of several."""

from pathlib import Path

import pytest

from benchmarks import result_file

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("name", ["quality-512", "texture-steps-128", "switches-qwen-512", "forecast-512"])
def test_committed_files_stay_as_they_are(name, tmp_path):
    path = RESULTS / f"{name}.json"
    before = path.read_bytes()
    content = result_file.read(path)
    assert content["machines"] == [content["machine"]] and content["rows"][0]["cases"][0]["machine"] == 0
    result_file.write(tmp_path / "again.json", content)
    assert (tmp_path / "again.json").read_bytes() == before == path.read_bytes()


def test_a_machine_is_known_by_its_description():
    first, other = dict(cpu="A", threads=1, commit="a", date="b"), dict(cpu="A", threads=2, commit="a", date="b")
    assert result_file.position(first | dict(commit="c", date="d"), [first, other]) == 0
    assert result_file.position(first, [first, other, first]) == 2  # the latest of its kind
    assert result_file.position(first | dict(wait_policy="PASSIVE"), [first, other]) == 2
