"""What the kernel tests share: which backends run here, and how an error is judged.

Every test runs on each backend of this machine: plain PyTorch always, Triton on a GPU or, with TRITON_INTERPRET=1 in
the environment, in Triton's interpreter (test_interpreter.py starts that run), which bfloat16.py teaches bfloat16 and
lean_interpreter.py makes faster.
"""

import json
import os

import pytest
import torch

import specedit_kernels

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETING
DEVICE = "cuda" if ON_GPU else "cpu"
if INTERPRETING:
    from tests.kernels import bfloat16, lean_interpreter

    bfloat16.install()
    lean_interpreter.install()


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        # "merged" takes no arbitrary biases: test_merged.py is about it.
        backends = [name for name in specedit_kernels.available_backends() if name != "merged"]
        backends = ["triton"] if INTERPRETING else backends
        metafunc.parametrize("backend", backends)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.fixture
def device():
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN, so an output element that a kernel forgets to write shows up."""
    torch.set_deterministic_debug_mode("warn")  # unlike use_deterministic_algorithms it imports no compiler
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(1234)


@pytest.fixture
def as_good():
    """Judges `got` by float64: at most twice the error of the same computation in PyTorch at the same precision."""

    def check(got, exact, same_precision):
        assert got.shape == exact.shape
        finite = exact.isfinite()
        assert torch.equal(got.double()[~finite], exact[~finite])
        if not bool(finite.any()):
            return
        error = (got.double() - exact)[finite].abs().max().item()
        yardstick = (same_precision.double() - exact)[finite].abs().max().item()
        # One rounding of the largest value, for the cases where PyTorch happens to be exact.
        rounding = torch.finfo(got.dtype).eps * exact[finite].abs().max().item()
        assert error <= 2 * yardstick + rounding, f"error {error:.3e}, PyTorch's {yardstick:.3e}"

    return check


@pytest.fixture
def tuned_dry_gpu(tmp_path, monkeypatch):
    """`dry_gpu.use`, without generating code, on a GPU whose file has the defaults as `change` returns them."""
    from benchmarks import dry_gpu
    from specedit_kernels.gpu import launch

    def use(capability, change, **options):
        table = json.loads((launch.CONFIG_FOLDER / launch.default_file_name(capability)).read_text())
        file = tmp_path / f"{tmp_path.name}.json"
        file.write_text(json.dumps(change(table)))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(launch, "CONFIG_FOLDER", tmp_path)
        monkeypatch.setattr(launch, "default_file_name", lambda capability: file.name)
        return dry_gpu.use(capability, **{"generates": False, **options})

    return use
