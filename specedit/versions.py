"""Which diffusers this package needs."""

import diffusers

OLDEST_DIFFUSERS = (0, 36)


def check_diffusers() -> None:
    """ImportError for a diffusers that is too old."""
    version = tuple(int(p) for p in diffusers.__version__.split(".")[:2])
    if version < OLDEST_DIFFUSERS:
        wanted = ".".join(map(str, OLDEST_DIFFUSERS))
        raise ImportError(
            f"specedit: expected diffusers >= {wanted}, got {diffusers.__version__}; pip install -U diffusers"
        )
