"""The launch parameters of attention that the package ships, and lengths that fit them."""

import importlib.util
import json
import os

import pytest
import torch


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


def fitting(lengths, dtype):
    """Lengths of as many whole and partial tiles: in the interpreter those of float32 are 16 x 16, of halves 64."""
    if os.environ.get("TRITON_INTERPRET") != "1" or dtype != torch.float32:
        return lengths
    return [[n if n <= 16 else -(-n // 4) for n in some] for some in lengths]
