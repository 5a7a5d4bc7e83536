"""Marks thorough tests as slow, and puts long tests first in every worker's share: tests/conftest.py loads it.

xdist's worksteal gives each worker a consecutive part of the tests, and takes from the end of one whose part is larger.
"""

import itertools
import os

import pytest


def in_shares(items, workers):
    """The tests with those marked `long` in front of each worker's part, all of a folder in one."""
    long = [item for item in items if item.get_closest_marker("long") is not None]
    folders = list(dict.fromkeys(item.path.parent for item in long))
    others = iter([item for item in items if item.get_closest_marker("long") is None])
    ordered = []
    for worker in range(workers):
        size = (len(items) - len(ordered)) // (workers - worker)  # as worksteal shares them out
        own = [item for item in long if folders.index(item.path.parent) % workers == worker]
        ordered += own + list(itertools.islice(others, max(0, size - len(own))))
    return ordered + list(others)


@pytest.hookimpl(wrapper=True)  # around the choice of tests, and pytest's own order
def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("thorough") is not None:
            item.add_marker("slow")
    result = yield
    items[:] = in_shares(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
    return result
