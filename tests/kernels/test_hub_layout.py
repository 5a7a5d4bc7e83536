"""The package laid out for the Hub, loaded from there under another name beside the installed one."""

import subprocess
import sys
import textwrap
import tomllib

import pytest

from specedit_kernels import hub_layout


@pytest.mark.slow
def test_layout(tmp_path, capsys):
    folder = tmp_path / "kernel"
    assert hub_layout.main([str(folder)]) == 0
    build = tomllib.loads((folder / "build.toml").read_text())
    assert build["general"]["name"] == "specedit-kernels" and "torch-noarch" in build
    package = folder / "torch-ext" / "specedit_kernels"
    assert (package / "gpu" / "configs" / "default_sm_90.json").exists()
    assert hub_layout.main([str(folder)]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err
    package.rename(package.parent / "kernels_copy_1")
    code = """
        import sys, torch
        import specedit_kernels
        sys.path.insert(0, sys.argv[1])
        import kernels_copy_1 as copy
        q = torch.randn(1, 5, 2, 16)
        assert torch.equal(copy.mixed_attention(q, q, q), specedit_kernels.mixed_attention(q, q, q))
        assert torch.ops.kernels_copy_1.mixed_attention is not torch.ops.specedit_kernels.mixed_attention
        assert "diffusers" not in sys.modules and "specedit" not in sys.modules
        assert copy.__version__ == specedit_kernels.__version__
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(package.parent)],
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr
