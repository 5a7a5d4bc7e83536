"""The built documentation: formulas, links, and the API reference."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import specedit
import specedit.micro
import specedit.testing
import specedit_kernels

pytest.importorskip("mkdocs", reason="needs the docs extra")
ROOT = Path(__file__).parents[2]


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


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """{path: Page} of a strict build, and its folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stderr
    return {path: Page(path.read_text()) for path in folder.rglob("*.html")}, folder


@pytest.mark.slow
def test_every_formula_is_rendered(site):
    pages, folder = site
    assert "<math" in (folder / "kernels" / "index.html").read_text()
    for path, page in pages.items():
        raw = re.search(r"\$[^$\n]+\$|\\\(|\\\[|arithmatex", page.text)
        assert raw is None, f"{path}: {raw}"


@pytest.mark.slow
def test_internal_links_and_anchors_exist(site):
    pages, folder = site
    for path, page in pages.items():
        if path.name == "404.html":  # its links are made from the site's address, which is not known
            continue
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists() and folder in target.parents, f"{path}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors | {"__skip"}, f"{path}: {link}"


@pytest.mark.slow
def test_pages_load_nothing_from_the_network(site):
    for path, page in site[0].items():
        assert not [address for address in page.loaded if urlsplit(address).netloc], path


@pytest.mark.parametrize(
    ("page", "package"),
    [
        ("specedit", specedit),
        ("micro", specedit.micro),
        ("testing", specedit.testing),
        ("kernels", specedit_kernels),
    ],
)
def test_the_reference_has_every_public_name(page, package):
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text()
    names = [name for name in package.__all__ if not name.isupper()]  # constants are described where they are used
    assert [name for name in names if f"{package.__name__}.{name}" not in text] == []
