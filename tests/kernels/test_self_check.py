"""The first use of a GPU: kernels are checked, and what fails is not used. The GPU is `benchmarks/dry_gpu`'s."""

import json
import math
import os
import stat
import warnings

import pytest
import torch

import specedit_kernels as kernels
from benchmarks import dry_gpu
from specedit_kernels import ops, self_check, verdict, verdict_file
from specedit_kernels.self_check_cases import cases

needs_driver = pytest.mark.skipif(bool(dry_gpu.missing()), reason=str(dry_gpu.missing()))
CPU = torch.device("cpu")
OPERATORS = {"gather_tokens", "scatter_tokens", "expand_tokens", "contract_tokens", "mixed_attention", "qk_norm_rope",
             "weighted_sum"}  # fmt: skip
CASES = list(cases(CPU, torch.bfloat16))


def on_pytorch(backend, name, args):
    """Plain PyTorch in place of the kernels."""
    return ops.run("torch" if backend == "triton" else backend, name, args)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SPECEDIT_KERNELS_SELF_CHECK", raising=False)
    return tmp_path / "cache" / "specedit" / "kernels.json"


def said(work):
    """The result of some work and its warnings of ours."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = work()
    return result, [str(w.message) for w in found if "specedit_kernels" in str(w.message)]


# --- the check itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_plain_pytorch_passes(half):
    findings = self_check.run_checks(CPU, on_pytorch, half=half)
    assert {finding.kernel for finding in findings} == OPERATORS | {"merged"}
    assert [str(finding) for finding in findings if not finding.passed] == []


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_wrong_results_fail(name):
    """A result of the wrong size, NaN, or an exception."""

    def nan(args, result):
        dry_gpu.broken(name, args, result)
        for output in result if isinstance(result, tuple) else (result,):
            if output is not None and output.numel():
                output.view(-1)[0] = math.nan

    def raises(args, result):
        raise RuntimeError("misaligned address\nand more")

    for spoil in (lambda args, result: dry_gpu.broken(name, args, result), nan, raises):

        def run(backend, operator, args, spoil=spoil):
            result = on_pytorch(backend, operator, args)
            spoil(args, result)
            return result

        findings = [self_check.check(case, run) for case in CASES if case.kernel == name]
        assert findings and not any(finding.passed for finding in findings)
        assert all(str(finding).startswith(f"{name} (") for finding in findings)
    assert all(str(finding).endswith(": RuntimeError: misaligned address") for finding in findings)


def test_a_bias_that_is_left_out_fails():
    def run(backend, name, args):
        without = (*args[:6], None, *args[7:]) if name == "mixed_attention" and backend == "triton" else args
        return on_pytorch(backend, name, without)

    findings = [self_check.check(case, run) for case in CASES if case.operator == "mixed_attention"]
    failed = [finding for finding in findings if not finding.passed]
    assert len(failed) == 5 and all(finding.kernel == "mixed_attention" for finding in failed)


def test_a_lack_of_memory_says_nothing_of_a_kernel():
    def run(backend, name, args):
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError):
        self_check.run_checks(CPU, run)


# --- the file ---------------------------------------------------------------------------------------------------------

OF = {"gpu": "Imaginary", "driver": "1"}
FINDINGS = [self_check.Finding("merged", "dense", 0.5, 1.0), self_check.Finding("weighted_sum", "x", why="broke"),
            self_check.Finding("gather_tokens", "x", math.inf, 1.0)]  # fmt: skip


def test_findings_are_kept_for_each_gpu_and_its_versions(cache):
    assert verdict_file.path() == cache and verdict_file.read(OF) is None
    assert verdict_file.write(OF, FINDINGS)
    found = verdict_file.read(OF)
    assert found[:2] == FINDINGS[:2] and [finding.passed for finding in found] == [True, False, False]
    assert verdict_file.read(OF | {"driver": "2"}) is None
    for driver in range(40):
        verdict_file.write(OF | {"driver": str(driver)}, FINDINGS[:1])
    content = json.loads(cache.read_text())
    assert len(content["checks"]) == 16 and verdict_file.read(OF | {"driver": "39"}) == FINDINGS[:1]
    assert [path.name for path in cache.parent.iterdir()] == ["kernels.json"]  # no temporary file stays


@pytest.mark.parametrize("text", ["", "{", "[]", '{"checks": 3}', '{"checks": [1, {"of": {}}]}', "\x00"])
def test_a_broken_file_is_written_anew(cache, text):
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert verdict_file.read({}) is None
    assert verdict_file.write({}, FINDINGS) and verdict_file.read({})[0] == FINDINGS[0]


def test_a_folder_that_cannot_be_written_is_no_error(cache, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file, where a folder should be")
    assert not verdict_file.write(OF, FINDINGS) and verdict_file.read(OF) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says to ignore it
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert verdict_file.path() == tmp_path / "home" / ".cache" / "specedit" / "kernels.json"
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(stat.S_IRUSR)
    assert os.geteuid() == 0 or not verdict_file.write(OF, FINDINGS)
    (tmp_path / "home").chmod(stat.S_IRWXU)


def test_an_identity_names_what_findings_depend_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = verdict_file.identity(torch.device("cuda", 0))
    assert found["gpu"] == "Imaginary" and found["capability"] == [9, 0] and found["torch"] == torch.__version__
    assert set(found) == {"gpu", "capability", "driver", "torch", "triton", "specedit_kernels", "kernels"}
    assert json.loads(json.dumps(found)) == found


# --- calls ------------------------------------------------------------------------------------------------------------


def calls():
    """A call of every operator that names no backend, and the result that plain PyTorch gives, by operator."""
    x, index = torch.randn(2, 50, 64), torch.tensor([4, 0, 49])
    q, bias = torch.randn(1, 70, 2, 64), torch.zeros(1, 70)
    bias[:, ::3] = math.log(4)
    weight, angles = torch.ones(64), torch.randn(70, 32)
    noise = torch.randn(2, 50, 4, 16, 3)
    return {
        "gather_tokens": lambda **b: kernels.gather_tokens(x, index, **b),
        "scatter_tokens": lambda **b: kernels.scatter_tokens(x[:, :3], index, x.clone(), **b),
        "expand_tokens": lambda **b: kernels.expand_tokens(x, 0.5, noise=noise, **b)[0],
        "contract_tokens": lambda **b: kernels.contract_tokens(noise.view(2, 50, 4, 48), 0.5, **b)[0],
        "mixed_attention": lambda **b: kernels.mixed_attention(q, q, q, key_bias=bias, **b),
        "qk_norm_rope": lambda **b: kernels.qk_norm_rope(q, q, weight, weight, angles.cos(), angles.sin(), **b)[0],
        "weighted_sum": lambda **b: kernels.weighted_sum(x[None], torch.ones(1), **b),
    }


@pytest.mark.slow
@needs_driver
def test_kernels_that_pass_are_used_without_a_word(cache):
    with dry_gpu.use((9, 0), generates=False, checks=True) as gpu:
        for name, call in calls().items():
            got, warned = said(call)
            torch.testing.assert_close(got, call(backend="torch"))
            assert warned == []
            gpu.clear()
            call()
            assert gpu.launches == 1, name
        assert kernels.attention_backend(CPU) == "triton"
    (entry,) = json.loads(cache.read_text())["checks"]
    assert entry["of"]["gpu"] == "dry sm_90" and len(entry["findings"]) > 20


@pytest.mark.slow
@needs_driver
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_a_wrong_kernel_is_not_used(cache, name):
    """One warning in all says which and why; results are right; asked for by name, it raises."""
    with dry_gpu.use((9, 0), generates=False, checks=True, faulty=[name]) as gpu:
        every, warned = calls(), []
        for call in every.values():
            got, more = said(call)
            warned += more
            torch.testing.assert_close(got, call(backend="torch"), atol=1e-5, rtol=1e-5)
        assert len(warned) == 1 and f"failed their check: {name} (bfloat16" in warned[0]
        assert "at most" in warned[0] and "specedit doctor" in warned[0]
        gpu.clear()
        every[name]()
        assert gpu.launches == 0
        for other, call in every.items():
            call()
            if other != name:
                assert gpu.launches == 1, other
            gpu.clear()
        assert kernels.attention_backend(CPU) == ("merged" if name == "mixed_attention" else "triton")
        # The file tells the next process, which warns again and checks nothing.
        verdict.forget()
        _, again = said(every["gather_tokens"])
        assert again == warned and gpu.launches == (name != "gather_tokens")


@pytest.mark.slow
@needs_driver
def test_a_wrong_kernel_is_not_used_for_arguments_that_were_checked():
    """Calls like those of the check itself would find its launches prepared."""
    with dry_gpu.use((9, 0), generates=False, checks=True, faulty=["gather_tokens"]) as gpu:
        x, index = next(case.args for case in CASES if case.operator == "gather_tokens")
        said(calls()["weighted_sum"])
        gpu.clear()
        assert torch.equal(kernels.gather_tokens(x, index), x[:, index]) and gpu.launches == 0


@pytest.mark.slow
@needs_driver
def test_a_wrong_kernel_that_is_asked_for_by_name_raises(monkeypatch):
    with dry_gpu.use((9, 0), generates=False, checks=True, faulty=["gather_tokens"]):
        gather = calls()["gather_tokens"]
        with pytest.raises(RuntimeError, match=r"gather_tokens: expected a kernel that passes.*error 5.0e-01"):
            said(lambda: gather(backend="triton"))
        with pytest.raises(RuntimeError, match=r"gather_tokens_out: expected a kernel that passes"):
            gather(backend="triton", out=torch.empty(2, 3, 64))
        assert torch.equal(gather(out=torch.empty(2, 3, 64)), gather(backend="torch"))
        assert calls()["weighted_sum"](backend="triton").shape == (2, 50, 64)
    monkeypatch.setenv("SPECEDIT_KERNELS_SELF_CHECK", "maybe")
    with pytest.raises(ValueError, match=r"SPECEDIT_KERNELS_SELF_CHECK: expected 0, 1, .* got 'maybe'"):
        verdict.guarded(torch.device("cuda"))
    monkeypatch.setenv("SPECEDIT_KERNELS_SELF_CHECK", "0")
    assert not verdict.guarded(torch.device("cuda"))


@pytest.mark.slow
@needs_driver
def test_attention_with_a_plan_is_checked_too(monkeypatch):
    """Wrong there alone, and where the plan cannot be made."""
    with dry_gpu.use((9, 0), generates=False, checks=True) as gpu:
        run = ops.run

        def wrong(backend, name, args):
            result = run(backend, name, args)
            if backend == "triton" and len(args) > 15 and args[15] is not None:
                dry_gpu.broken(name, args, result)
            return result

        for owner, attribute, change in ((ops, "run", wrong), (kernels.gpu, "plan", lambda *_: 1 / 0)):
            with monkeypatch.context() as patch:
                patch.setattr(owner, attribute, change)
                findings = verdict.find(CPU, anew=True).failed
            assert {finding.kernel for finding in findings} == {"mixed_attention"}
            assert all("planned" in finding.label for finding in findings)
        assert not verdict.find(CPU, anew=True).failed and gpu.launches


@pytest.mark.slow
@needs_driver
def test_attention_that_merging_cannot_do_goes_to_pytorch():
    """With a wrong attention kernel: any bias, lists of blocks."""
    q = torch.randn(1, 70, 2, 64)
    keep = kernels.BlockKeep.from_mask(torch.tensor([[True, False], [False, True]]), query_block=64, key_block=64)
    with dry_gpu.use((9, 0), generates=False, checks=True, faulty=["mixed_attention"]) as gpu:
        for arguments in ({"key_bias": torch.randn(1, 70)}, {"block_keep": keep}, {}):
            got, _ = said(lambda arguments=arguments: kernels.mixed_attention(q, q, q, **arguments))
            gpu.clear()
            torch.testing.assert_close(got, kernels.mixed_attention(q, q, q, backend="torch", **arguments))
        kernels.mixed_attention(q, q, q, key_bias=torch.randn(1, 70))
        assert gpu.launches == 0


@needs_driver
@pytest.mark.parametrize(
    "error",
    [ImportError("expected Triton 3.6"), RuntimeError("expected a C compiler"), RuntimeError("expected a GPU of 8.0")],
    ids=str,
)
def test_a_gpu_without_kernels_runs_on_pytorch(monkeypatch, cache, error):
    def refuse(device):
        raise error

    with dry_gpu.use((9, 0), checks=True) as gpu, monkeypatch.context() as patch:
        patch.setattr(ops, "check_gpu", refuse)
        results, warned = said(lambda: {name: call() for name, call in calls().items()})
        assert set(results) == OPERATORS and gpu.launches == 0
        assert len(warned) == 1 and f"no Triton kernel runs here: {error}" in warned[0]
        assert kernels.attention_backend(CPU) == "merged"
    assert not cache.exists()  # a compiler may be there tomorrow


def test_a_backend_is_checked_before_any_work(monkeypatch):
    def refuse(device):
        raise ImportError("expected Triton")

    kernels.check_backend(None, CPU)
    kernels.check_backend("triton", CPU)
    monkeypatch.setattr(ops, "check_gpu", refuse)
    with pytest.raises(ImportError, match="expected Triton"):
        kernels.check_backend("triton", torch.device("cuda"))
    for backend in ("merged", "torch"):
        kernels.check_backend(backend, torch.device("cuda"))
    assert kernels.attention_backend(CPU) == "torch"
