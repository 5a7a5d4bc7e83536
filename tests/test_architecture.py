"""Imports only ever point down the floors of scripts/imports.py, and never in a circle."""

from graphlib import TopologicalSorter

from scripts import imports


def test_no_arrow_points_up():
    drawn = imports.arrows(imports.find_modules("specedit", "specedit_kernels"))
    assert len(drawn) > 15
    assert not [found for pair, found in drawn.items() if not imports.points_down(pair)]


def test_packages_do_not_import_training():
    modules = imports.find_modules("specedit", "specedit_kernels", "training")
    packaged = {name for name in modules if not name.startswith("training")}
    assert packaged < modules.keys()
    assert not {
        name for name in packaged if any(used.startswith("training") for used in imports.imports_of(name, modules))
    }


def test_imports_have_no_circle():
    modules = imports.find_modules("specedit", "specedit_kernels", "training")
    TopologicalSorter({name: imports.imports_of(name, modules, typing=False) for name in modules}).prepare()
