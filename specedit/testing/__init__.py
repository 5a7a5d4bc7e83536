"""Tests that every adapter must pass, to derive from. They need pytest.

import pytest
from specedit.testing import Conformance, Family

class TestMyModel(Conformance):
    @pytest.fixture
    def family(self):
        return Family(adapter=MyModel, make=make_tiny_pipeline, call=arguments_of_one_edit)
"""

try:
    import pytest as _pytest
except ImportError as error:
    raise ImportError("specedit.testing: expected pytest, which is not installed; pip install pytest") from error

_REWRITTEN = ("cases", "conformance", "family", "modulation", "stages", "switches")
_pytest.register_assert_rewrite(*(f"{__name__}.{name}" for name in _REWRITTEN))

from .cases import QUICK  # noqa: E402
from .conformance import Conformance  # noqa: E402
from .family import Family, make_picture  # noqa: E402

__all__ = ["QUICK", "Conformance", "Family", "make_picture"]
