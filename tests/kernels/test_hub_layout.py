"""The package laid out for the Hub, loaded from there under another name beside the installed one."""

import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from specedit_kernels import hub_layout


@pytest.mark.slow
def test_layout(tmp_path, capsys):
    folder = tmp_path / "kernel"
    assert hub_layout.main([str(folder)]) == 0
    build = tomllib.loads((folder / "build.toml").read_text())
    assert build["general"]["name"] == "specedit-kernels" and "torch-noarch" in build
    assert (folder / "torch-ext" / "specedit_kernels" / "gpu" / "configs" / "default_sm_90.json").exists()
    assert hub_layout.main([str(folder)]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err


@pytest.mark.thorough
def test_the_hubs_loader_takes_the_layout_and_the_copy_stands_alone(tmp_path):
    """In a process of its own, which imports nothing of this package but the copy, and then the installed one."""
    hub_layout.lay_out(tmp_path / "kernel")
    code = """
        import sys, torch
        from pathlib import Path
        from kernels import get_local_kernel
        loaded = get_local_kernel(Path(sys.argv[1]), backend="cpu")
        q = torch.randn(1, 5, 2, 16)
        want = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3).transpose(1, 2)
        torch.testing.assert_close(loaded.mixed_attention(q, q, q), want)
        name = "specedit_kernels_cpu_1"
        assert loaded.__name__ == name and hasattr(getattr(torch.ops, name), "gather_tokens")
        assert not {"specedit", "specedit_kernels", "diffusers"} & set(sys.modules), "the copy stands alone"
        sys.path.insert(0, sys.argv[2])
        import specedit_kernels
        assert torch.equal(loaded.mixed_attention(q, q, q), specedit_kernels.mixed_attention(q, q, q))
        assert getattr(torch.ops, name).mixed_attention is not torch.ops.specedit_kernels.mixed_attention
        assert loaded.__version__ == specedit_kernels.__version__
        assert loaded.__file__ != specedit_kernels.__file__ and not {"specedit", "diffusers"} & set(sys.modules)
    """
    arguments = [str(tmp_path / "kernel"), str(Path(hub_layout.__file__).parents[1])]
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code), *arguments],
                            capture_output=True, text=True, cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
