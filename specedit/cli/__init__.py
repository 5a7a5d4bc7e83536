"""The command line: `specedit demo | edit | eval | bench`, a module for each command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import bench, demo, edit, evaluate
from .shared import Failure


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse itself prints the usage too, which takes several lines
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args=None, namespace=None):
        """Of a command's parser too: what it does not know is an error that names the command, not `specedit`."""
        found, unknown = super().parse_known_args(args, namespace)
        return (found, unknown) if not unknown else self.error(f"unrecognized arguments: {' '.join(unknown)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = _Parser(prog="specedit", description="Fast diffusion image editing.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo, edit, evaluate, bench):
        command.add(commands)
    args = parser.parse_args(arguments)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("specedit: stopped", file=sys.stderr)
        return 130
    except (Failure, ValueError, TypeError, OSError, ImportError) as error:
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        print(f"specedit: {first}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        first = "--offload, " if hasattr(args, "offload") else ""
        print(f"specedit: out of memory; {first}a smaller picture or model takes less", file=sys.stderr)
        return 2
