"""The compile check: what it accepts, what it refuses, and how it says so."""

import importlib.util
import json
import os

import pytest

from specedit_kernels import compile_check

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton, not interpreting",
)


def table(capability, **config):
    blocks = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 2} | config
    return {"capability": capability, "attention": [{"shape": {"head_dim": 64, "bits": 16}, "config": blocks}]}


def first(table):
    return next(compile_check._attention(table))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_attention_uses_the_matrix_units(capability):
    result = compile_check.check(first(table([capability // 10, 0])), capability, "here")
    assert result.problems == [] and result.matrix_instructions > 0 and result.spills == 0
    assert 0 < result.registers <= 255 and 0 < result.shared <= result.shared_limit


@pytest.mark.parametrize("capability", [90, 100])
def test_warps_are_specialised(capability):
    variant = next(compile_check._attention_ws(table([capability // 10, 0]) | {"attention_tma": []}))
    result = compile_check.check(variant, capability, "here")
    assert result.problems == [] and result.matrix_instructions > 0
    whole = compile_check.check(first(table([9, 0])), 90, "here")  # the same check on a kernel that is not
    assert whole.problems == []
    plain = first(table([9, 0]))
    plain.specialized = True
    assert compile_check.check(plain, 90, "here").problems == ["warps are not specialised"]


def test_spills_are_refused():
    result = compile_check.check(first(table([8, 0], block_n=128, num_warps=4)), 80, "here")
    assert "spills registers" in result.problems and result.spills > 0


def test_too_much_shared_memory_is_refused():
    result = compile_check.check(first(table([8, 0], num_stages=16)), 80, "here")
    assert any("shared memory" in problem for problem in result.problems)


def test_a_failure_to_compile_is_a_result():
    result = compile_check.check(first(table([8, 0], block_n=48)), 80, "here")
    assert result.problems and result.problems[0].startswith("does not compile")


def test_command(tmp_path, capsys, monkeypatch):
    """The whole command on the small kernels; every kernel of every configuration is CI's own step."""
    monkeypatch.setattr(compile_check, "variants", lambda table: list(compile_check._rows(table))[:2])
    file = tmp_path / "rows.json"
    assert compile_check.main(["--arch", "sm_80", "sm_90", "--json", str(file)]) == 0
    assert "4 variants, 0 with problems" in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90"} and all(row["registers"] for row in rows)
    bad = [first(table([8, 0], block_n=128, num_warps=4))]
    monkeypatch.setattr(compile_check, "variants", lambda table: bad)
    assert compile_check.main(["--arch", "sm_80"]) == 1


def test_every_kernel_is_listed():
    """A kernel somebody adds to gpu/ must also be compiled by the check."""
    from triton.runtime.jit import JITFunction

    from specedit_kernels.gpu import attention, attention_ws, expand, launch, norm_rope, rows, weighted_sum

    defaults = json.loads((launch.CONFIG_FOLDER / "default_sm_90.json").read_text())
    listed = {variant.kernel.fn.__name__ for variant in compile_check.variants(defaults)}
    modules = (attention, attention_ws, expand, norm_rope, rows, weighted_sum)
    launched = {
        name for module in modules for name, value in vars(module).items()
        if isinstance(value, JITFunction) and not name.startswith("_")
    }  # fmt: skip
    assert listed == launched
