"""The pages name files that exist, and the README keeps its order."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATHS = re.compile(r"`((?:specedit|specedit_kernels|training|tests|scripts|benchmarks|docs)/[\w./*-]*)`")


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/adapters.md", "CONTRIBUTING.md"])
def test_every_path_that_a_page_names_exists(page):
    named = set(PATHS.findall((ROOT / page).read_text()))
    assert named
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


def test_links_between_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    lost = []
    for page in pages:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
            file = (page.parent / target).resolve() if target else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                lost.append(f"{page.name}: {target}#{anchor}")
    assert lost == []


def anchors(page):
    """The anchors of a page's headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_readme_opens_in_the_agreed_order():
    text = (ROOT / "README.md").read_text()
    parts = [
        "# SpecEdit", "docs/images/demo.png", "specedit.install(pipe", "table: gains:", "table: gpu-state",
        "git clone --depth 1", "```sh", "table: setup:", "## Use it", "## Supported models", "## Limits",
    ]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
