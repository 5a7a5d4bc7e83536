"""Options that choose another method than SpecEdit, or one from a file of the user's own."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from ..config import DEFAULT_PRESET
from .errors import CLIError

PLUGIN = "specedit_plugin"  # the module that --plugin is imported as


def add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", help="another way to sample the edit, such as steps or ralu, default specedit")
    parser.add_argument("--setting", help="a setting that the method's source reports, such as 7x")
    parser.add_argument("--plugin", type=Path, help="Python file that registers methods, selectors or forecasts")


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration's field `method` as the options say; nothing for SpecEdit itself. Imports the plugin first.

    Raises:
        CLIError: the plugin cannot be imported, no such method or setting, or one beside a preset or restore.
    """
    if args.plugin is not None:
        import_plugin(args.plugin)
    if args.method in (None, "specedit"):
        if args.setting is not None:
            raise CLIError(f"--setting: expected none without another --method, got {args.setting}")
        return {}
    for option in ("preset", "restore"):
        if getattr(args, option) not in (None, DEFAULT_PRESET):
            raise CLIError(f"--{option}: expected none with --method {args.method}, got {getattr(args, option)}")
    from ..registry import methods

    if args.method not in methods:
        raise CLIError(f"--{methods.unknown(args.method, also=repr('specedit') + ' or ')}")
    chosen = methods[args.method]
    return {"method": chosen() if args.setting is None else chosen.at(args.setting)}


def named(args: argparse.Namespace) -> str:
    """What the run is called: its preset, or its method with the setting."""
    if args.method in (None, "specedit"):
        return str(args.preset)
    return args.method if args.setting is None else f"{args.method}-{args.setting}"


def import_plugin(path: Path) -> None:
    """Import a user's file, which registers what it defines. CLIError where that fails."""
    if not path.is_file():
        raise CLIError(f"--plugin: expected a Python file, got {path}")
    spec = importlib.util.spec_from_file_location(PLUGIN, path)
    if spec is None or spec.loader is None:
        raise CLIError(f"--plugin: expected a Python file (.py), got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[PLUGIN] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[PLUGIN]
        raise CLIError(f"--plugin: {path} cannot be imported, {type(error).__name__}: {error}") from error
