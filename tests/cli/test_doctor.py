"""`specedit doctor`: its text, its JSON and its exit code, also on a GPU that is not there."""

import importlib.util
import json

import pytest
import torch

from benchmarks import dry_gpu
from specedit import cli, doctor, doctor_text
from specedit_kernels import ops, self_check

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these are about machines without a GPU")
needs_driver = pytest.mark.skipif(bool(dry_gpu.missing()), reason=str(dry_gpu.missing()))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def report(capsys):
    """Runs `specedit doctor --json` with further options; returns the exit code and the report."""

    def run(*options):
        code = cli.main(["doctor", "--json", *options])
        return code, json.loads(capsys.readouterr().out)

    return run


def test_a_machine_without_a_gpu(report, capsys):
    code, found = report("--no-interpreter")
    assert code == 0 and found["problems"] == [] and found["advice"] == []
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["specedit"]
    assert found["machine"]["gpu"] is None and found["machine"]["cpu"]
    assert found["kernels"]["interpreter"] == "it was not asked to"
    assert found["kernels"]["run"] is False and found["kernels"]["why"] == "there is no GPU"
    assert found["auto"] == {
        "attention": "torch", "others": "torch", "why": "PyTorch with a mask, because there is no GPU",
    }  # fmt: skip
    assert {one["where"] for one in found["checks"]} == {"PyTorch"} and all(one["passed"] for one in found["checks"])
    assert {one["kernel"] for one in found["checks"]} >= {"merged", "mixed_attention", "qk_norm_rope"}
    timed = {(one["shape"], one["provider"]): one for one in found["timings"]}
    assert set(timed) == {(s, p) for s in ("stock", "mixed", "packed") for p in ("merged", "torch")}
    assert all(one["ms"] > 0 and one["why"] is None for one in timed.values())
    assert sum(timed["mixed", "torch"]["tokens"]) < sum(timed["stock", "torch"]["tokens"])
    text = doctor_text.text(found)
    for line in (
        "GPU       none", "kernels   do not run: there is no GPU", "the kernels were not checked: it was not asked to",
        "mixed, 20 % edited", 'attention="auto" takes "torch" for mixed stages', "Everything that was checked is right",
        "To a bug report attach what `specedit doctor --json` prints",
    ):  # fmt: skip
        assert line in text
    assert "WRONG" not in text and max(map(len, text.splitlines())) < 160


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_are_checked_in_the_interpreter(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("mixed_attention", "gather_tokens", "scatter_tokens", "expand_tokens", "contract_tokens",
                 "qk_norm_rope", "weighted_sum"):  # fmt: skip
        (line,) = [line for line in text.splitlines() if line.startswith(f"  interpreter {name}")]
        right, _, cases = line.split()[2:5]
        assert int(right) == int(cases) > 0
    assert "were not checked" not in text and "were checked:" not in text


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_an_interpreter_that_does_not_run_is_said(report, tmp_path, monkeypatch):
    """Nothing wrong is known then, so the exit code stays 0."""
    (tmp_path / "torch").mkdir()  # which its process imports first
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemError('a broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, found = report()
    assert code == 0 and {one["where"] for one in found["checks"]} == {"PyTorch"}
    assert found["kernels"]["interpreter"].startswith("Triton's interpreter stopped: SystemError: a broken")
    assert "checked: Triton's interpreter stopped" in doctor_text.text(found)


@pytest.mark.slow
@needs_driver
def test_a_gpu_whose_kernels_are_right(report):
    with dry_gpu.use((9, 0), generates=False, checks=True):
        code, found = report()
    assert code == 0 and found["machine"]["gpu"] == "dry sm_90" and found["machine"]["capability"] == [9, 0]
    assert found["kernels"]["run"] and found["kernels"]["launch_parameters"] == "default_sm_90.json"
    assert found["auto"]["attention"] == "triton" and found["auto"]["others"] == "triton"
    assert {one["where"] for one in found["checks"]} == {"GPU", "PyTorch"}
    assert {one["label"].split(",")[0] for one in found["checks"] if one["where"] == "GPU"} == {
        "bfloat16", "float16", "float32",
    }  # fmt: skip
    assert {one["provider"] for one in found["timings"]} == {"triton", "merged", "torch"}
    assert "GPU       dry sm_90, compute capability 9.0, driver" in doctor_text.text(found)


@pytest.mark.slow
@needs_driver
def test_a_wrong_kernel_is_named_and_the_exit_code_is_1(report):
    with dry_gpu.use((9, 0), generates=False, checks=True, faulty=["mixed_attention", "gather_tokens"]):
        code, found = report()
    assert code == 1 and {line.split(" (")[0] for line in found["problems"]} == {
        "GPU: mixed_attention", "GPU: gather_tokens",
    }  # fmt: skip
    assert found["auto"]["attention"] == "merged" and found["auto"]["others"] == "triton, but torch for gather_tokens"
    assert "because of the kernel: mixed_attention (bfloat16" in found["auto"]["why"]
    text = doctor_text.text(found)
    assert "WRONG     gather_tokens (float16): error 5.0e-01" in text and "checks are wrong. Please report it." in text
    assert not any(one["provider"] == "triton" for one in found["timings"])


@pytest.mark.slow
@needs_driver
def test_a_gpu_without_a_compiler(report, monkeypatch):
    """Nothing wrong is used: the exit code is 0, and the advice says what to mend."""

    def refuse(device):
        raise RuntimeError("expected a C compiler, got none")

    with dry_gpu.use((9, 0), checks=True), monkeypatch.context() as patch:
        patch.setattr(ops, "check_gpu", refuse)
        code, found = report()
    assert code == 0 and found["kernels"]["run"] is False
    assert found["auto"]["attention"] == "merged" and found["auto"]["others"] == "torch"
    assert found["advice"][-1] == "the kernels would run with this mended: expected a C compiler, got none"
    assert "kernels   do not run: expected a C compiler, got none" in doctor_text.text(found)


def test_wrong_pytorch_is_a_problem(report, monkeypatch):
    """Whatever is wrong and would be used counts, not only kernels."""
    from specedit_kernels import merged

    own = merged.mixed_attention
    monkeypatch.setattr(merged, "mixed_attention", lambda *args, **more: tuple(x * 1.5 for x in own(*args, **more)))
    code, found = report("--no-interpreter")
    assert code == 1 and {line.split(" (")[0] for line in found["problems"]} == {"PyTorch: merged"}
    assert self_check.FLOOR < 1 and doctor.PYTORCH == "PyTorch"


def test_help_and_unknown_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--help"])
    assert stopped.value.code == 0 and "--no-interpreter" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--gpu"])
    assert stopped.value.code == 2 and "specedit doctor: unrecognized arguments: --gpu" in capsys.readouterr().err


def test_a_mistyped_switch_is_no_fault_of_a_kernel(monkeypatch, capsys):
    for name in ("SPECEDIT_KERNELS_DEBUG", "SPECEDIT_KERNELS_SELF_CHECK"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "maybe")
            assert cli.main(["doctor", "--no-interpreter"]) == 2
        assert f"{name}: expected 0, 1, false" in capsys.readouterr().err
