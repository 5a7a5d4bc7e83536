"""The version, and what type checkers learn from the signatures."""

import importlib.util
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

import specedit
import specedit_kernels

ROOT = Path(__file__).parents[2]


def test_one_version():
    """Both packages and the distribution read it from one file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    path = ROOT / project["tool"]["hatch"]["version"]["path"]
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    names = {}
    exec(path.read_text(), names)
    assert specedit.__version__ == specedit_kernels.__version__ == names["__version__"]
    assert path.parent == Path(specedit_kernels.__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_type_checkers_know_what_attention_returns(tmp_path):
    """torch is a stub here: the real one would take mypy half a minute."""
    (tmp_path / "torch.pyi").write_text("class Tensor: ...\ndef __getattr__(name: str): ...\n")
    (tmp_path / "snippet.py").write_text(
        textwrap.dedent("""
        import torch
        from specedit_kernels.api import mixed_attention
        q = torch.Tensor()
        flag = bool(input())
        reveal_type(mixed_attention(q, q, q))
        reveal_type(mixed_attention(q, q, q, return_lse=False))
        reveal_type(mixed_attention(q, q, q, key_bias=q, return_lse=True))
        reveal_type(mixed_attention(q, q, q, return_lse=flag))
    """)
    )
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=skip", "torch.pyi", "snippet.py",
         str(ROOT / "specedit_kernels" / "api.py")],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    revealed = [line.split('"')[1] for line in result.stdout.splitlines() if "Revealed type" in line]
    revealed = [text.replace("builtins.", "") for text in revealed]
    out, both = "torch.Tensor", "tuple[torch.Tensor, torch.Tensor]"
    assert revealed == [out, out, both, f"{out} | {both}"], result.stdout + result.stderr
