"""The built documentation, shared by its tests."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RAW_FORMULA = re.compile(r"\$[^$\n]+\$|\\\(|\\\[|arithmatex")


class Page(HTMLParser):
    """A page's anchors, links, files that a browser would load, and its text outside code and formulas."""

    def __init__(self, html):
        super().__init__()
        self.anchors, self.links, self.loaded, self.text, self.tags = set(), [], [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.add(attrs.get("id"))
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if tag in ("script", "img", "iframe") and attrs.get("src"):
            self.loaded.append(attrs["src"])
        if tag == "link" and attrs.get("rel") in ("stylesheet", "preload", "preconnect"):
            self.loaded.append(attrs["href"])
        if tag in ("code", "pre", "math", "script", "style"):
            self.tags.append(tag)

    def handle_endtag(self, tag):
        if self.tags and self.tags[-1] == tag:
            self.tags.pop()

    def handle_data(self, data):
        if not self.tags:
            self.text += data


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """{path: Page} of a strict build, and its folder."""
    pytest.importorskip("mkdocs", reason="needs the docs extra")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stderr
    return {path: Page(path.read_text()) for path in folder.rglob("*.html")}, folder


@pytest.fixture(scope="session")
def raw_formula():
    """Finds a formula that was not rendered."""
    return RAW_FORMULA.search
