"""Names of modules and of public functions."""

import inspect
import pkgutil

import pytest

import specedit
import specedit.micro
import specedit_kernels


@pytest.mark.parametrize("package", [specedit, specedit.micro, specedit_kernels], ids=lambda package: package.__name__)
def test_no_module_has_the_name_of_a_public_function(package):
    functions = {name for name in package.__all__ if inspect.isroutine(getattr(package, name))}
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda name: None)
    assert functions and not [module.name for module in found if module.name.rpartition(".")[2] in functions]
