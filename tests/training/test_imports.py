"""The packages never import `training`, and no imports form a cycle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("specedit", "specedit_kernels", "training")
    for path in (ROOT / package).rglob("*.py")
}


def imports(name):
    """The modules of FILES that a module imports, anywhere in its code."""
    path = FILES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1] * bool(node.level), *(node.module or "").split(".")]
            base = ".".join(filter(None, base))
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in FILES else base for a in node.names}
    return found & set(FILES) - {name}


def test_packages_do_not_import_training():
    wrong = {name: imports(name) for name in FILES if not name.startswith("training")}
    assert not {name: used for name, used in wrong.items() if any(u.startswith("training") for u in used)}


def test_imports_have_no_cycle():
    TopologicalSorter({name: imports(name) for name in FILES}).prepare()  # raises CycleError
