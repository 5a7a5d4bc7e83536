"""Record the machine; `--results FILE` writes rows in the format of benchmarks/results/*.json."""

import json
import sys

import pytest

from benchmarks import kernel_harness
from specedit.evaluation import results

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--results", metavar="FILE", help="write the measured rows to this JSON file")


def pytest_configure(config):
    config.stash[ROWS] = []


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(results.machine())


def pytest_sessionfinish(session):
    path, rows = session.config.getoption("--results"), session.config.stash[ROWS]
    if path and rows:
        command = " ".join(["pytest", *sys.argv[1:]])
        with open(path, "w") as file:
            json.dump({"machine": results.machine(), "command": command, "rows": rows}, file, indent=1)


@pytest.fixture
def rows(request):
    return request.config.stash[ROWS]


@pytest.fixture(scope="session")
def roofs():
    return kernel_harness.rooflines()
