"""The order in which workers begin."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.shares import in_shares, pytest_collection_modifyitems


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


def test_thorough_tests_are_slow_before_tests_are_chosen():
    def marked(name, *markers):
        found = {marker: True for marker in markers}
        return SimpleNamespace(
            path=Path("a", name),
            name=name,
            get_closest_marker=found.get,
            add_marker=lambda new: found.update({new: True}),
        )

    items = [marked("a1", "thorough"), marked("a2"), marked("a3", "slow", "long")]
    around = pytest_collection_modifyitems(items)
    next(around)
    assert [one.name for one in items if one.get_closest_marker("slow")] == ["a1", "a3"]
    with pytest.raises(StopIteration):
        next(around)
    assert [one.name for one in items] == ["a3", "a1", "a2"]
