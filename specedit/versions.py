"""Which diffusers this package needs, and what its import need not say."""

import logging
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

OLDEST_DIFFUSERS = (0, 36)


def package_version() -> str:
    """The version in `specedit_kernels/_version.py`, read without importing that package, which imports torch."""
    package = find_spec("specedit_kernels")
    if package is None or package.origin is None:
        raise ImportError("specedit: expected the package specedit_kernels beside it, found none")
    return str(runpy.run_path(str(Path(package.origin).with_name("_version.py")))["__version__"])


def check_diffusers() -> None:
    """ImportError for a diffusers that is too old."""
    import diffusers

    version = tuple(int(p) for p in diffusers.__version__.split(".")[:2])
    if version < OLDEST_DIFFUSERS:
        wanted = ".".join(map(str, OLDEST_DIFFUSERS))
        raise ImportError(
            f"specedit: expected diffusers >= {wanted}, got {diffusers.__version__}; pip install -U diffusers"
        )


@contextmanager
def suppress_torchvision_warning() -> Iterator[None]:
    """transformers warns of every picture processor that it runs without torchvision, which none here needs."""
    logger = logging.getLogger("transformers.utils.import_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "torchvision" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
