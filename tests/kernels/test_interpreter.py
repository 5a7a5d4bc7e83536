"""Runs this folder again with every kernel in Triton's interpreter, where no GPU is needed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ("bfloat16", "tokens", "expand", "attention", "grouped_query", "qk_norm_rope", "weighted_sum", "launch", "plan")
OTHERS = ("tune", "overlap", "derivatives", "block_attention", "block_keep", "out", "split_attention")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already interpreting")
@pytest.mark.parametrize("names", [CORE, pytest.param(OTHERS, marks=pytest.mark.thorough)], ids=["core", "others"])
def test_kernels_in_the_interpreter(names):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    files = [f"tests/kernels/test_{name}.py" for name in names]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
