"""The launch parameters of attention that the package ships."""

import importlib.util
import json
import os

import pytest


def attention_entries():
    """Parameters (kernel, entry) of all files, each tile once. Triton's interpreter knows no warps and no stages."""
    if importlib.util.find_spec("triton") is None:
        return []
    from specedit_kernels.gpu import launch

    interpreting, found = os.environ.get("TRITON_INTERPRET") == "1", {}
    for path in sorted(launch.CONFIG_FOLDER.glob("*.json")):
        table = json.loads(path.read_text())
        for kernel in ("attention_tma", "attention"):
            for entry in table.get(kernel, []):
                config = entry["config"]
                tile = [config["block_m"], config["block_n"]] if interpreting else config
                known = json.dumps([kernel, entry["shape"], tile])
                found.setdefault(known, pytest.param(kernel, entry, id=f"{path.stem}-{kernel}-{entry['shape']}"))
    return list(found.values())
