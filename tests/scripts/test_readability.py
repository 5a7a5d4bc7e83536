"""Sentences are counted without code and tables, and every page of the project stays readable."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def readability(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("readability")


def test_code_tables_and_headings_do_not_count(readability):
    page = """# A heading of words

One two three.

```python
many = words("that nobody reads as a sentence")
```

    indented code is not prose either

| a table | of many | cells |

<!-- table: x:y -->
Generated text is left out too.
<!-- end -->

$$a = b \\text{ and so on}$$

Four `with.code()` [a link](a/long/path.md).
"""
    assert readability.sentences(page) == ["One two three", "Four code a link"]
    assert readability.mean_length(page) == 3.5


def test_list_items_and_sentences_are_split(readability):
    page = "First one. `Second` two three!\n\n- **An item** of five words\n- another\n  continued here\n\n1. Numbered"
    assert [readability.words(s) for s in readability.sentences(page)] == [2, 3, 5, 3, 1]


def test_abbreviations_and_versions_do_not_end_a_sentence(readability):
    assert len(readability.sentences("Use Triton 3.6 as in eq. 6, e.g. On a GPU, by Smith et al. There.")) == 1


def test_a_page_of_long_sentences_fails(readability, tmp_path, capsys):
    long, short = tmp_path / "long.md", tmp_path / "short.md"
    long.write_text(" ".join(["word"] * 40) + ".")
    short.write_text("A few words.")
    assert readability.main([str(short)]) == 0 and readability.main([str(short), str(long)]) == 1
    assert " 40.0 " in capsys.readouterr().out


def test_pages_stay_within_the_limit(readability):
    pages = readability.pages()
    assert {"README.md", "CONTRIBUTING.md", "guide.md", "architecture.md"} <= {page.name for page in pages}
    lengths = {page.name: readability.mean_length(page.read_text()) for page in pages}
    assert {name: length for name, length in lengths.items() if length > readability.LIMIT} == {}
