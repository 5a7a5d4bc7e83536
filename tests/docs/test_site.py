"""The built documentation: formulas, links, and the API reference."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import specedit
import specedit.micro
import specedit.testing
import specedit_kernels

ROOT = Path(__file__).parents[2]
LARGEST = 300_000  # bytes of a picture


@pytest.mark.slow
@pytest.mark.long
def test_every_formula_is_rendered(site, raw_formula):
    pages, folder = site
    assert "<math" in (folder / "kernels" / "index.html").read_text()
    for path, page in pages.items():
        assert raw_formula(page.text) is None, f"{path}: {raw_formula(page.text)}"


@pytest.mark.slow
@pytest.mark.long
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
@pytest.mark.long
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


def test_pictures_are_small():
    pictures = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".jpg", ".svg")]
    assert len(pictures) > 9
    assert {path.name: path.stat().st_size for path in pictures if path.stat().st_size > LARGEST} == {}


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in navigation] == []


def test_the_citation_names_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {specedit.__version__}\n" in citation
    assert "2605.02152" in citation and "2605.02152" in (ROOT / "docs" / "citing.md").read_text()
