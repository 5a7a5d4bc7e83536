"""The order in which workers begin."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.shares import in_shares


def item(name, long=False):
    marker = lambda wanted: True if long and wanted == "long" else None  # noqa: E731
    return SimpleNamespace(path=Path(name[0], name), name=name, get_closest_marker=marker)


ITEMS = [item("a1"), item("a2", True), item("a3", True), item("b1"), item("b2"), item("c1"), item("c2", True),
         item("d1", True), item("d2")]  # fmt: skip


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        (1, "a2 a3 c2 d1 a1 b1 b2 c1 d2"),
        (2, "a2 a3 d1 a1 | c2 b1 b2 c1 d2"),
        (4, "a2 a3 | c2 a1 | d1 b1 | b2 c1 d2"),
    ],
)
def test_every_worker_begins_with_long_tests_of_whole_folders(workers, expected):
    assert [one.name for one in in_shares(ITEMS, workers)] == expected.replace("| ", "").split()


def test_few_tests_are_all_there():
    long = [item(f"a{i}", True) for i in range(5)]
    assert {one.name for one in in_shares([*long, item("b1")], 4)} == {"a0", "a1", "a2", "a3", "a4", "b1"}
