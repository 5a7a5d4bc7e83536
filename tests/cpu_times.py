"""Names the slow tests that are not marked `slow`: a pytest plugin which tests/conftest.py loads.

Time is CPU time of the test and of the processes it waited for, so a busy machine changes it little. With
SPECEDIT_TEST_BUDGET=1 in the environment an unmarked test over the limit fails the run.
"""

import os

import pytest

LIMIT = 1.0  # seconds
SHOWN = 8

_last = 0.0  # CPU time when the latest phase of a test ended
_calls: list[tuple[float, str, bool]] = []  # (seconds, test, whether it is marked slow), in the process that prints
_total = 0.0


def _cpu() -> float:
    return sum(os.times()[:4])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logstart():
    global _last
    _last = _cpu()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    global _last
    report = yield
    now = _cpu()
    report.cpu, _last = now - _last, now  # xdist carries attributes of reports over
    return report


def pytest_runtest_logreport(report):
    global _total
    _total += getattr(report, "cpu", 0.0)
    if report.when == "call":
        _calls.append((report.cpu, report.nodeid, "slow" in report.keywords))


def _over():
    return [call for call in _calls if call[0] > LIMIT and not call[2]]


def pytest_terminal_summary(terminalreporter):
    unmarked = sorted((call for call in _calls if not call[2]), reverse=True)[:SHOWN]
    terminalreporter.section(f"slowest tests not marked slow ({_total:.0f} CPU seconds in all tests)")
    for seconds, test, _ in unmarked:
        over = f"  over {LIMIT:g} s: mark it slow or make it smaller" if seconds > LIMIT else ""
        terminalreporter.line(f"{seconds:6.2f} s {test}{over}")


def pytest_sessionfinish(session):
    if os.environ.get("SPECEDIT_TEST_BUDGET") == "1" and session.exitstatus == 0 and _over():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
