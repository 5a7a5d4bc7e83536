"""Prints who imports whom: the floors of the packages from top to bottom, and the arrows between their rooms.

python scripts/imports.py
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = (  # from the top; a room imports from the floors below its own, and nothing from its neighbours
    ("specedit.cli",),
    ("specedit.app", "specedit.integrations"),
    ("specedit.batch",),
    ("specedit.pipelines",),
    ("specedit.micro",),
    ("specedit.evaluation",),
    ("specedit.api",),
    ("specedit.models", "specedit.cost", "specedit.methods"),
    ("specedit.method",),
    ("specedit.forecast", "specedit.run_report"),
    ("specedit.layout",),  # with config, placement, registry and every other module of specedit/ itself
    ("specedit_kernels",),
)
SAME_ROOM = {
    "specedit.__main__": "specedit.cli", "specedit.report_figure": "specedit.run_report",
    "specedit.report_comparison": "specedit.run_report", "specedit.report_html": "specedit.run_report",
}  # fmt: skip
TESTS = "specedit.testing"  # shipped tests: they may import everything, and nothing may import them


def find_modules(*packages: str) -> dict[str, Path]:
    """Every module of the packages by its name."""
    paths = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports_of(name: str, modules: dict[str, Path], *, typing: bool = True) -> set[str]:
    """The modules that a module imports, anywhere in its code. typing: also those for type checkers alone."""
    found: set[str] = set()
    for node in _nodes(_parsed(modules[name]), typing):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if modules[name].name == "__init__.py" else name.split(".")[:-1]
            base = [*package[: len(package) - node.level + 1] * bool(node.level), *(node.module or "").split(".")]
            base = ".".join(filter(None, base))
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base for a in node.names}
    return found & set(modules) - {name}


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _nodes(node: ast.AST, typing: bool) -> Iterator[ast.AST]:
    yield node
    only_types = not typing and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):  # which imports nothing
            continue
        if not (only_types and child in node.body):
            yield from _nodes(child, typing)


def room_of(module: str) -> str:
    """The room of FLOORS in which a module lies."""
    if module == "specedit" or module.startswith(TESTS):
        return module
    rooms = [room for floor in FLOORS for room in floor]
    package = ".".join(module.split(".")[:2])
    package = SAME_ROOM.get(package, package)
    if package in rooms:
        return package
    return "specedit_kernels" if module.startswith("specedit_kernels") else "specedit.layout"


def floor_of(room: str) -> int:
    """The number of a room's floor, from the top; -1 of `specedit` itself."""
    return next((number for number, floor in enumerate(FLOORS) if room in floor), -1)


def arrows(modules: dict[str, Path]) -> dict[tuple[str, str], list[str]]:
    """For each pair of rooms the imports from the first to the second, "module -> module".

    `specedit` itself names what is public, so it may import everything and nothing may import it.
    """
    drawn: dict[tuple[str, str], list[str]] = {}
    for name in sorted(name for name in modules if name != "specedit" and not name.startswith(TESTS)):
        for other in sorted(imports_of(name, modules)):
            pair = room_of(name), room_of(other)
            if pair[0] != pair[1]:
                drawn.setdefault(pair, []).append(f"{name} -> {other}")
    return drawn


def points_down(pair: tuple[str, str]) -> bool:
    """Whether an arrow goes to a lower floor."""
    return floor_of(pair[0]) < floor_of(pair[1])


def main() -> None:
    modules = find_modules("specedit", "specedit_kernels")
    drawn = arrows(modules)
    sizes = Counter(map(room_of, modules))
    for number, floor in enumerate(FLOORS, start=1):
        print(f"floor {number} from the top")
        for room in filter(sizes.get, floor):
            below = sorted((other, len(found)) for (own, other), found in drawn.items() if own == room)
            words = ", ".join(f"{other.removeprefix('specedit.')} ({count})" for other, count in below)
            print(f"    {room}, {sizes[room]} modules, imports {words or 'nothing else of the packages'}")
    wrong = [line for pair, found in drawn.items() if not points_down(pair) for line in found]
    print("\n".join(["Arrows that do not point down:", *wrong] if wrong else ["Every arrow points down."]))


if __name__ == "__main__":
    main()
