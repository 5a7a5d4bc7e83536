"""DuCa: aggressive and conservative steps take turns."""

from specedit.forecast.duca import DuCa


def test_turns():
    assert [DuCa().recomputes(since) for since in range(1, 6)] == [False, True, False, True, False]
