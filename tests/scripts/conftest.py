import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def docs(tmp_path, monkeypatch):
    """make_docs, with the result files of this test."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(importlib.import_module("docs_results"), "RESULTS", tmp_path)
    return importlib.import_module("make_docs")
