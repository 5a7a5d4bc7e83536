"""The compile check: what it accepts, what it refuses, and how it says so."""

import importlib.util
import itertools
import json
import os

import pytest

from specedit_kernels import compile_check, compile_variants, sass

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton, not interpreting",
)


def table(capability, **config):
    blocks = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 2} | config
    return {"capability": capability, "attention": [{"shape": {"head_dim": 64, "bits": 16}, "config": blocks}]}


def first(table):
    return next(compile_variants.attention(table))


def spilling():
    """A small kernel with fewer registers than it needs."""
    entries = [{"shape": {"rows": 3}, "config": {"block": 1024, "num_warps": 4}}]
    variant = list(compile_variants.weighted_sum({"weighted_sum": entries}))[-1]
    variant.options |= {"maxnreg": 24}
    return variant


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_attention_uses_the_matrix_units(capability):
    result = compile_check.check(first(table([capability // 10, 0])), capability, "here")
    assert result.problems == [] and result.matrix_instructions > 0 and result.spills == 0
    assert 0 < result.registers <= 255 and 0 < result.shared <= result.shared_limit


@pytest.mark.slow
def test_spills_are_rejected():
    result = compile_check.check(spilling(), 80, "here")
    assert result.problems == ["spills registers"] and result.spills > 8  # bytes of a frame and what accesses it


@pytest.mark.slow
def test_serialised_products_are_rejected():
    """With too few registers ptxas makes each wgmma wait for the one before, and says so in a log nobody reads."""
    variant = first(table([9, 0]))
    variant.options |= {"maxnreg": 64}
    assert "wgmma instructions are serialised" in compile_check.check(variant, 90, "here").problems


@pytest.mark.slow
def test_main_loop_is_counted():
    """A 128 x 64 tile of head dim 64: 4 steps of each of two products, and an exponential per element."""
    loop = compile_check.check(first(table([9, 0])), 90, "here").main_loop
    per_thread = 128 * 64 // 256
    assert loop["matrix"] == 8 and loop["mufu"] == per_thread + 2 and loop["barrier"] > 0
    assert loop["fma"] >= per_thread and loop["all"] > loop["matrix"] + loop["mufu"] + loop["fma"] + loop["barrier"]
    # One of four tensor cores, 512 multiply-adds a cycle: 16 rows of a warp, 64 keys, 64 channels, two products.
    assert loop["tensor"] == 2 * 16 * 64 * 64 // 512
    assert sass.bound(loop) == loop["tensor"] / loop["all"] and sass.bound({"all": 9}) is None


@pytest.mark.slow
def test_main_loop_with_descriptors_is_not_counted_with_its_tail():
    """The jumps back of a wait span both, and both multiply."""
    entry = {"shape": {"head_dim": 64, "bits": 16}, "config": {"block_m": 128, "block_n": 64, "num_warps": 8,
                                                               "num_stages": 2}}  # fmt: skip
    result = compile_check.check(first(table([9, 0]) | {"attention_tma": [entry]}), 90, "here")
    assert result.main_loop["matrix"] == 8 and result.matrix_instructions == 16


@pytest.mark.thorough
def test_too_much_shared_memory_is_rejected():
    result = compile_check.check(first(table([8, 9], num_stages=7)), 89, "here")
    assert any("shared memory" in problem for problem in result.problems)


@pytest.mark.slow
def test_a_failure_to_compile_is_a_result():
    result = compile_check.check(first(table([8, 0], block_n=48)), 80, "here")
    assert result.problems and result.problems[0].startswith("does not compile")


@pytest.mark.slow
def test_command(tmp_path, capsys, monkeypatch):
    """The whole command on the small kernels; every kernel of every configuration is CI's own step."""
    monkeypatch.setattr(compile_check, "variants", lambda table: list(compile_variants.rows(table))[:2])
    file = tmp_path / "rows.json"
    assert compile_check.main(["--arch", "sm_80", "sm_90", "--jobs", "1", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert "4 variants, 0 with problems" in said and said.startswith("Triton 3.")
    rows = json.loads(file.read_text())["rows"]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90"} and all(row["registers"] for row in rows)
    monkeypatch.setattr(compile_check, "variants", lambda table: [spilling()])
    assert compile_check.main(["--arch", "sm_80", "--jobs", "1", "--pairwise"]) == 1
    with pytest.raises(SystemExit):
        compile_check.main(["--jobs", "0"])
    with pytest.raises(SystemExit):
        compile_check.main(["--only", "no such kernel"])
    assert "--only: expected part of a variant's name, got 'no such kernel'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compile_check.main(["--jobs", "0"])
    assert "--jobs: expected at least 1, got 0" in capsys.readouterr().err


@pytest.mark.thorough
def test_another_process_agrees():
    """One task, so that one process starts."""
    names = [variant.name for _, variant in compile_check.shipped(80)]
    tasks = [(80, names.index("copy_rows bf16 C64 gather"))]
    (other,) = compile_check.check_shipped(tasks, 2)
    assert [other] == list(compile_check.check_shipped(tasks, 1))
    assert other.name == "copy_rows bf16 C64 gather" and not other.problems


@pytest.mark.slow
def test_unpacked_tokens_are_listed_and_compile():
    found = {v.name: v for _, v in compile_check.shipped(90) if "unpacked" in v.name and "bf16" in v.name}
    assert sorted(found) == [
        "contract bf16 unpacked", "expand bf16 noise given unpacked", "expand bf16 philox unpacked",
    ]  # fmt: skip
    for variant in found.values():
        assert variant.constants["PATCH"] == 1 and variant.constants["CHANNELS"] == 64
    assert compile_check.check(found["contract bf16 unpacked"], 90, "here").problems == []


@pytest.mark.slow
@pytest.mark.parametrize("capabilities", [[80], [90], [100], [80, 90, 100]], ids=str)
def test_pairwise_leaves_out_sizes_and_combinations_of_three(capabilities):
    everything = {(c, number): v for c in capabilities for number, (_, v) in enumerate(compile_check.shipped(c))}
    chosen = {task: everything[task] for task in compile_check._pairwise(capabilities)}
    assert len(chosen) < len(everything) / 3

    def switches(variants):
        return {
            (capability, v.kernel.fn.__name__, name, value)
            for (capability, _), v in variants.items()
            for name, value in {**v.constants, "grouped": v.grouped, "matrix": v.matrix}.items()
            if not isinstance(value, int) or value in (0, 1)
        }

    assert switches(chosen) == switches(everything)
    # Two switches of a product, as the kernel reads them.
    names = ("DESCRIPTORS", "PACKED", "HAS_BIAS", "LISTED", "ORDERED", "MASKED_TAIL", "PRECISION")
    for first, second in itertools.combinations(names, 2):
        met, shipped = (
            {(v.constants[first], v.constants[second]) for v in some.values() if v.kernel.fn.__name__ == "attend"}
            for some in (chosen, everything)
        )
        assert met == shipped
    # Registers run out first in the widest heads.
    for kernel, most in (("attend", 256), ("attend_pingpong", 128), ("norm_rope", 256)):
        for capability in capabilities:
            dims = [v.constants["DIM_P2"] for (c, _), v in chosen.items()
                    if c == capability and v.kernel.fn.__name__ == kernel]  # fmt: skip
            assert max(dims, default=most) == most and (dims or capability != 90)


@pytest.mark.slow
@pytest.mark.parametrize("scatter", [False, True])
def test_rows_move_in_16_byte_vectors(scatter):
    """Row strides are run-time numbers; the compiler still knows that rows begin at multiples of a vector."""
    import triton
    from triton.backends.compiler import GPUTarget

    defaults = {"copy_rows": [{"shape": {"row_bytes": 128}, "config": {"tile_bytes": 8192, "block_bytes": 4096,
                                                                      "num_warps": 4}}]}  # fmt: skip
    variant = next(v for v in compile_variants.rows(defaults) if v.constants["SCATTER"] == scatter)
    compiled = triton.compile(
        compile_variants.source(variant), target=GPUTarget("cuda", 90, 32), options=variant.options
    )
    ptx = compiled.asm["ptx"]
    for access in ("ld.global", "st.global"):
        rows = [line for line in ptx.splitlines() if access in line and "b64" not in line]
        assert rows and all(".v4.b32" in line for line in rows), rows


@pytest.mark.parametrize("aligned", [True, False])
def test_sums_read_16_byte_vectors_where_layers_are_aligned(aligned):
    import triton
    from triton.backends.compiler import GPUTarget

    defaults = {"weighted_sum": [{"shape": {"rows": 3}, "config": {"block": 1024, "num_warps": 4}}]}
    variant = next(v for v in compile_variants.weighted_sum(defaults) if bool(v.aligned) == aligned)
    compiled = triton.compile(
        compile_variants.source(variant), target=GPUTarget("cuda", 90, 32), options=variant.options
    )
    wide = [line for line in compiled.asm["ptx"].splitlines() if "ld.global" in line and ".v4.b32" in line]
    assert len(wide) == (3 if aligned else 0)  # a mask that ends anywhere splits vectors


def test_every_kernel_is_listed():
    """A kernel somebody adds to gpu/ must also be compiled by the check."""
    from triton.runtime.jit import JITFunction

    from specedit_kernels.gpu import (
        attention,
        attention_order,
        attention_pingpong,
        attention_plan,
        attention_split,
        expand,
        launch,
        norm_rope,
        rows,
        sums,
    )

    defaults = json.loads((launch.CONFIG_FOLDER / "default_sm_90.json").read_text())
    listed = {variant.kernel.fn.__name__ for variant in compile_check.variants(defaults)}
    modules = (attention, attention_order, attention_pingpong, attention_plan, attention_split, expand, norm_rope,
               rows, sums)  # fmt: skip
    launched = {
        name for module in modules for name, value in vars(module).items()
        if isinstance(value, JITFunction) and not name.startswith("_")
    }  # fmt: skip
    assert listed == launched


def test_lengths_are_run_time_numbers():
    """No length is a constant or specialised, so one compiled kernel serves every length."""
    from specedit_kernels.gpu import (
        attention,
        attention_pingpong,
        attention_plan,
        attention_split,
        expand,
        norm_rope,
        rows,
    )

    lengths = {"queries", "keys", "tiles", "tokens", "out_tokens", "rows", "table_rows", "sequences", "capacity",
               "split_from", "parts"}  # fmt: skip
    kernels = (attention.attend, attention_pingpong.attend_pingpong, attention_plan.plan_tiles,
               attention_split.join_parts, expand.expand, expand.contract, norm_rope.norm_rope,
               rows.copy_rows)  # fmt: skip
    for kernel in kernels:
        found = [parameter for parameter in kernel.params if parameter.name in lengths]
        assert found and all(p.do_not_specialize and not p.is_constexpr for p in found), kernel.fn.__name__
