"""The version of this package, of `specedit` and of the distribution."""

__version__ = "0.1.0"
