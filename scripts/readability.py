"""Prints the mean number of words per sentence of every page, and fails if a page exceeds the limit.

    python scripts/readability.py [PAGE...]

Code, tables, generated parts, headings and link targets do not count. A list item is a sentence of its own.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 20.0

NOT_PROSE = (
    (r"<!-- table: .*?<!-- end -->", ""),  # generated
    (r"<!--.*?-->", ""),
    (r"^(```|~~~).*?^\1\s*$", ""),
    (r"\$\$.*?\$\$", ""),
    (r"^(?: {4}|\t)(?![-*\d]).*$", ""),  # indented code; a list's continuation lines are indented by less
    (r"^\s*\|.*$", ""),
    (r"^#.*$", ""),
    (r"!\[[^\]]*\]\([^)]*\)", ""),
    (r"\[([^\]]*)\]\([^)]*\)", r"\1"),
    (r"`[^`]*`", "code"),
    (r"\$[^$\n]*\$", "formula"),
)
# A sentence ends at its mark before a capital, a quotation or the end; an abbreviation's full stop does not end one.
ABBREVIATIONS = r"(?<!\be\.g)(?<!\bi\.e)(?<!\beq)(?<!\bet al)"
END = re.compile(ABBREVIATIONS + r"[.!?]+(?=\s+[\"(*]*(?:[A-Z0-9]|code\b|formula\b)|\s*$)")


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that people read, without those that are generated from docstrings."""
    top = [root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*(page for page in top if page.exists()), *sorted((root / "docs").glob("*.md"))]


def sentences(markdown: str) -> list[str]:
    """The sentences of a page's prose."""
    for pattern, replacement in NOT_PROSE:
        markdown = re.sub(pattern, replacement, markdown, flags=re.S | re.M if ".*?" in pattern else re.M)
    found = []
    for block in re.split(r"\n\s*\n|^\s*(?:[-*]|\d+\.)\s+", markdown, flags=re.M):
        found += (part for part in END.split(" ".join(block.split())) if re.search(r"\w", part))
    return found


def words(sentence: str) -> int:
    return len(re.findall(r"[^\W_][\w'’./-]*", sentence))


def mean_length(markdown: str) -> float:
    """Mean words per sentence; 0 for a page without prose."""
    lengths = [words(sentence) for sentence in sentences(markdown)]
    return sum(lengths) / len(lengths) if lengths else 0.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pages", type=Path, nargs="*", help="default: the README, CONTRIBUTING, CHANGELOG and docs")
    parser.add_argument("--longest", type=int, default=0, metavar="N", help="also print the N longest sentences")
    args = parser.parse_args(arguments)
    found = [(page, page.read_text()) for page in args.pages or pages()]
    for page, text in found:
        print(f"{mean_length(text):5.1f}  {page.relative_to(ROOT) if page.is_relative_to(ROOT) else page}")
        for sentence in sorted(sentences(text), key=words, reverse=True)[: args.longest]:
            print(f"       {words(sentence):3d}  {sentence}")
    return 1 if any(mean_length(text) > LIMIT for _, text in found) else 0


if __name__ == "__main__":
    sys.exit(main())
