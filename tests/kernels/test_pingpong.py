"""The ping-pong kernel: its source as Python on a simulated multiprocessor, and where it is used.

Nothing here runs on a GPU; `self_check` compares the compiled kernel there.
"""

import importlib.util
import itertools
import json
import math
import os
import sys
import warnings

import pytest
import torch

import specedit_kernels as kernels
from benchmarks import dry_gpu
from specedit_kernels import compile_check, compile_variants, ops, self_check, tune, verdict
from specedit_kernels.self_check_cases import pingpong_cases
from tests.kernels.test_attention import LENGTHS, expected, packed, softmax_attention

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton, not interpreting", allow_module_level=True)

from specedit_kernels import gpu
from specedit_kernels.gpu import attention_launch, launch
from tests.kernels import hopper, interleavings

RINGS = {name: i for i, name in enumerate(("q_full", "k_full", "k_empty", "v_full", "v_empty", "turns"), 1)}
needs_driver = pytest.mark.skipif(bool(dry_gpu.missing()), reason=str(dry_gpu.missing()))
CPU, BF16 = torch.device("cpu"), torch.bfloat16


def parameters(stages=2, keys=32, rows=128):
    return {"attention_pingpong": {"block_m": rows, "block_n": keys, "num_stages": stages}}


def draw(rng, queries, keys, heads=(2, 1), dim=64, samples=1, dtype=BF16):
    shapes = (samples, queries, heads[0], dim), *[(samples, keys, heads[1], dim)] * 2
    return [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]


def judge(as_good, results, q, k, v, bias, scale):
    for b in range(len(q)):
        more = (None if bias is None else bias[b], scale)
        wide = [x[b].repeat_interleave(q.shape[2] // x.shape[2], 1) for x in (q, k, v)]
        exact, same = (softmax_attention(*wide, *more, dtype) for dtype in (torch.float64, q.dtype))
        for got, right, rounded in zip(results, exact, same):
            as_good(got[b], right, rounded)


# --- its numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("keys", [1, 31, 32, 33, 64, 200])
def test_any_number_of_blocks(monkeypatch, rng, as_good, keys, stages):
    """One block, partial or full, and rings that are used more than once; in several orders of the warps."""
    q, k, v = draw(rng, 70, keys)
    for seed, bias in enumerate((None, torch.randn(1, keys, generator=rng))):
        with hopper.simulated(monkeypatch, seed):
            got = gpu.run("mixed_attention", (q, k, v, None, None, None, bias, 0.125, True), parameters(stages))
        judge(as_good, got, q, k, v, bias, 0.125)


@pytest.mark.parametrize("dim, scale, half", [(64, -0.2, BF16), (96, 0.1, BF16), (128, 0.09, torch.float16)])
@pytest.mark.parametrize("queries", [1, 64, 65, 300])
def test_any_rows_scale_and_head_dim(monkeypatch, rng, as_good, dim, scale, half, queries):
    """Rows beyond the end are not written, which `hopper` checks; grouped heads, several samples, and no lse."""
    q, k, v = draw(rng, queries, 70, (4, 2), dim, 2, half)
    rows = 256 if queries == 300 else 128
    for lse in (True, False) if queries == 65 else (True,):
        with hopper.simulated(monkeypatch, queries):
            got = gpu.run("mixed_attention", (q, k, v, None, None, None, None, scale, lse), parameters(2, 32, rows))
        judge(as_good, got if lse else got[:1], q, k, v, None, scale)


def test_strided_tensors_are_read_in_place(monkeypatch, rng, as_good):
    fused = torch.randn(2, 100, 3, 4, 64, generator=rng).to(BF16)
    heads_first = torch.randn(2, 4, 100, 64, generator=rng).to(BF16).transpose(1, 2)
    for q, k, v in (fused.unbind(2), (heads_first[:, 3:50], *[heads_first[:, ::2, 2:]] * 2)):
        with hopper.simulated(monkeypatch):
            got = gpu.run("mixed_attention", (q, k, v, None, None, None, None, 0.125, True), parameters())
        judge(as_good, got, q, k, v, None, 0.125)


@pytest.mark.parametrize("hidden", [slice(0, 32), slice(32, 96), slice(96, 100), slice(0, 96), slice(0, 100)], ids=str)
def test_hidden_keys(monkeypatch, rng, as_good, hidden):
    """Whole blocks, the partial one, which is read first, all but that one, and all keys: 0, and -inf as the lse."""
    q, k, v = draw(rng, 70, 100)
    bias = torch.randn(1, 200, generator=rng)[:, ::2]
    bias[:, hidden] = -math.inf
    with hopper.simulated(monkeypatch):
        got = gpu.run("mixed_attention", (q, k, v, None, None, None, bias, 0.125, True), parameters())
    judge(as_good, got, q, k, v, bias, 0.125)
    if hidden == slice(0, 100):
        assert not got[0].any() and bool((got[1] == -math.inf).all())


def plan_of(lengths, rows=128):
    """Query blocks of packed sequences in order, and two more rows, for programs without work."""
    plan, first = [], 0
    for b, n in enumerate(lengths):
        blocks = -(-n // rows)
        plan += [(b, first)] * blocks
        first += blocks
    return torch.tensor([*plan, (-1, first), (-1, first)], dtype=torch.int32)


@pytest.mark.parametrize("lengths", [*LENGTHS, ([300, 5, 0], [31, 32, 200])], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_sequences(monkeypatch, rng, as_good, lengths, with_bias):
    """No keys, fewer than a block, no queries, one sequence without a plan."""
    if not sum(lengths[0]):
        lengths = ([1, *lengths[0]], [0, *lengths[1]])
    q, k, v, cu_q, cu_k = packed(rng, CPU, BF16, 2, 64, *lengths)
    bias = torch.randn(len(k), generator=rng) if with_bias else None
    plan = plan_of(lengths[0])
    args = (q, k, v, cu_q, cu_k, None, bias, 0.125, True, None, None, 0, 0, plan, 128, None, None, None, 0)
    with hopper.simulated(monkeypatch):
        got = gpu.run("mixed_attention", args, parameters())
    for result, *right in zip(got, *[expected(q, k, v, cu_q, cu_k, bias, 0.125, one) for one in (torch.float64, BF16)]):
        as_good(result, *right)


def order_of(bias, ends, size=32):
    """What `order_keys` lists of a bias (T,): blocks of one bias from the front, others from the back."""
    slots = max(1, -(-len(bias) // size))
    key_order, tile_bias = torch.zeros(slots, dtype=torch.int32), torch.zeros(slots)
    counts = torch.zeros(len(ends) - 1, 2, dtype=torch.int32)
    for b, (start, stop) in enumerate(itertools.pairwise(ends)):
        front, back = start // size, start // size + (stop - start) // size - 1
        for tile in range((stop - start) // size):
            values = bias[start + tile * size : start + (tile + 1) * size]
            if bool((values == values[0]).all()) and values[0].isfinite():
                key_order[front], tile_bias[front] = tile, values[0] / math.log(2)
                counts[b, 0] += 1
                front += 1
            elif bool((values > -math.inf).any()):
                key_order[back] = tile
                counts[b, 1] += 1
                back -= 1
    return key_order, counts, tile_bias, size


def runs(length, kinds, rng):
    """A bias of blocks of 32 keys: "=" one value, "-" hidden, "~" any values. All that follow are of the last kind."""
    values = {"=": lambda: torch.full((32,), math.log(4)), "-": lambda: torch.full((32,), -math.inf),
              "~": lambda: torch.randn(32, generator=rng)}  # fmt: skip
    return torch.cat([values[kinds[min(i, len(kinds) - 1)]]() for i in range(length // 32 + 1)])[:length]


@pytest.mark.parametrize("kinds", ["=", "~", "-", "==~", "~=", "-=", "=-~", "~~-", "=~=~", "--=-"])
@pytest.mark.parametrize("keys", [[20, 96], [128, 130], [64, 0], [150, 32]], ids=str)
def test_a_plan_orders_blocks_of_one_bias(monkeypatch, rng, as_good, kinds, keys):
    """With and without a partial block, which another one stands in for as the first; hidden blocks are not read."""
    lengths = [[70, 130], keys]
    q, k, v, cu_q, cu_k = packed(rng, CPU, BF16, 2, 64, *lengths)
    bias = torch.cat([runs(n, kinds, rng) for n in keys])
    planned = (plan_of(lengths[0]), 128, *order_of(bias, cu_k.tolist()))
    args = (q, k, v, cu_q, cu_k, None, bias, 0.125, True, None, None, 0, 0, *planned)
    with hopper.simulated(monkeypatch, len(kinds)):
        got = gpu.run("mixed_attention", args, parameters())
    for result, *right in zip(got, *[expected(q, k, v, cu_q, cu_k, bias, 0.125, one) for one in (torch.float64, BF16)]):
        as_good(result, *right)


def test_a_plan_of_a_dense_batch_or_of_other_lengths(monkeypatch, rng, as_good):
    q, k, v = draw(rng, 70, 150, samples=2)
    bias = torch.stack([runs(150, "=~-", rng), runs(150, "-==", rng)])
    order = order_of(bias.flatten(), [0, 150, 300])
    args = (q, k, v, None, None, None, bias, 0.125, True, None, None, 0, 0, None, 0)
    with hopper.simulated(monkeypatch):
        got = gpu.run("mixed_attention", (*args, *order), parameters())
        judge(as_good, got, q, k, v, bias, 0.125)
        wrong = (torch.full_like(order[0], 900), order[1] + 90, *order[2:])
        assert gpu.run("mixed_attention", (*args, *wrong), parameters())[0].isfinite().all()


@pytest.mark.parametrize("keys", [0, 7, 32, 33, 70])
def test_no_value_of_another_sequence_is_seen(monkeypatch, rng, keys):
    """NaN and infinity on both sides of a sequence, and in the place of keys that it does not have."""
    q, k, v, cu_q, cu_k = packed(rng, CPU, BF16, 1, 64, [10, 70, 10], [40, keys, 40])
    for x in (k, v):
        x[:40], x[40 + keys :] = math.nan, math.inf
    plan = (plan_of([10, 70, 10]), 128, None, None, None, 0)
    args = (q, k, v, cu_q, cu_k, None, None, 0.125, True, None, None, 0, 0, *plan)
    with hopper.simulated(monkeypatch):
        out, lse = gpu.run("mixed_attention", args, parameters())
    assert bool(out[10:80].isfinite().all()) and not bool(lse[:, 10:80].isnan().any())


def test_wrong_offsets_stay_within_the_tensors(monkeypatch, rng):
    """The simulated memory ends where the tensors do."""
    q, k, v, good, _ = packed(rng, CPU, BF16, 1, 64, [20, 20, 20], [20, 20, 20])
    for ends in ([0, 40, 10, 60], [0, 10, 20, 900], [-50, 10, 20, 30], [60, 0, 60, 0]):
        bad = torch.tensor(ends, dtype=torch.int32)
        args = (q, k, v, good, bad, None, torch.zeros(60), 0.125, False, None, None, 0, 0, plan_of([20] * 3), 128)
        with hopper.simulated(monkeypatch):
            assert gpu.run("mixed_attention", (*args, None, None, None, 0), parameters())[0].isfinite().all()


# --- its barriers -----------------------------------------------------------------------------------------------------


def actions(monkeypatch, blocks, stages, bias=True):
    """What each warp does, and how many arrivals complete each barrier."""
    keys = 32 * blocks - 3
    q, k, v = draw(torch.Generator().manual_seed(0), 70, keys, (1, 1))
    row = torch.zeros(1, keys) if bias else None
    with hopper.simulated(monkeypatch) as machine:
        gpu.run("mixed_attention", (q, k, v, None, None, None, row, 0.125, True), parameters(stages))
    return machine.traces, {barrier["name"]: barrier["count"] for barrier in machine.barriers}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stages", [1, 2])
def test_warps_meet_in_every_order(monkeypatch, stages, bias):
    """No deadlock, nothing overwritten before it is read, nothing read before it has landed."""
    for blocks in (1, 2, 3, 4):
        assert interleavings.explore(*actions(monkeypatch, blocks, stages, bias)) > 80


@pytest.mark.thorough
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_warps_meet_in_every_order_of_longer_sequences(monkeypatch, stages):
    """More blocks than slots, so that each kind of slot is used again."""
    for blocks in range(5, 7) if stages < 3 else (stages, stages + 1):
        for bias in (False, True):
            assert interleavings.explore(*actions(monkeypatch, blocks, stages, bias)) > 80


def test_a_missing_wait_is_found(monkeypatch):
    """Some order goes wrong without any wait of side 0 for keys, values or its turn, or of the loader for the second
    use of a slot of values. Other waits repeat what a turn or an earlier wait has made sure of."""
    traces, counts = actions(monkeypatch, 4, 2)
    k_full, v_full, v_empty, turns = RINGS["k_full"], RINGS["v_full"], RINGS["v_empty"], RINGS["turns"]
    needed = [(0, i) for i, (what, which, *_) in enumerate(traces[0])
              if what == "wait" and which[0] in (k_full, v_full, turns)]  # fmt: skip
    needed.remove((0, traces[0].index(("wait", (turns, 0), 1))))  # the first turn is side 0's at once
    needed += [(2, i) for i, action in enumerate(traces[2]) if action[0] == "wait" and action[1:][0][0] == v_empty
               and action[2] == 0]  # fmt: skip
    assert len(needed) == 4 + 4 + 2 + 2
    for warp, i in needed:
        fewer = [trace[:i] + trace[i + 1 :] if n == warp else trace for n, trace in enumerate(traces)]
        with pytest.raises(AssertionError, match=r"too soon|too late|landed|all wait|too many"):
            interleavings.explore(fewer, counts)


def test_sides_take_turns(monkeypatch):
    """In every order: side 0 issues its products of a block, then side 1, then side 0 those of the next."""
    traces, counts = actions(monkeypatch, 4, 2)
    turns = RINGS["turns"]
    for side, trace in enumerate(traces[:2]):
        mine = [action for action in trace if action[1:] and isinstance(action[1], tuple) and action[1][0] == turns]
        waits = [("wait", (turns, side), (i + side) % 2) for i in range(1, 4)]
        assert mine == [one for wait in waits for one in (wait, ("arrive", (turns, 1 - side)))]


def test_a_wrong_wait_shows_in_the_numbers(monkeypatch, rng):
    """What the simulation is for: a parity that is wrong ends in a deadlock, a loader that does not wait in NaN."""
    q, k, v = draw(rng, 70, 200)
    args = (q, k, v, None, None, None, None, 0.125, True)
    right = kernels.mixed_attention(q, k, v, scale=0.125)

    def run(seed):
        with hopper.simulated(monkeypatch, seed):
            return gpu.run("mixed_attention", args, parameters())[0]

    torch.testing.assert_close(run(0), right, atol=0.02, rtol=0.02)
    wait = hopper.Machine.wait
    monkeypatch.setattr(hopper.Machine, "wait", lambda self, barrier, parity: wait(self, barrier, 0))
    with pytest.raises(hopper.Deadlock, match="all warps wait"):
        run(0)

    def hasty(self, barrier, parity):
        if barrier["name"][0] not in (RINGS["k_empty"], RINGS["v_empty"]):
            wait(self, barrier, parity)

    monkeypatch.setattr(hopper.Machine, "wait", hasty)
    with pytest.raises(AssertionError):
        for seed in range(8):
            torch.testing.assert_close(run(seed), right, atol=0.02, rtol=0.02)


# --- the compiled kernel ----------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_warps_of_a_side_wait_for_each_other_before_they_free_a_slot():
    """One thread arrives for all, so a barrier of its warps comes first, in every version of Triton."""
    import triton
    from triton.backends.compiler import GPUTarget

    table = json.loads((launch.CONFIG_FOLDER / "default_sm_90.json").read_text())
    name = "attend bf16 D128 pingpong 128x64x2 packed bias lse"
    variant = next(variant for variant in compile_variants.pingpong(table) if variant.name == name)
    compiled = triton.compile(
        compile_variants.source(variant), target=GPUTarget("cuda", 90, 32), options=variant.options
    )
    said = ("bar.sync", "bar.warp.sync", "mbarrier.arrive.shared", "ld.shared", "st.shared", "wgmma.wait")
    found = [word for line in compiled.asm["ptx"].splitlines() for word in said if word in line]
    before = {found[i - 1] for i, word in enumerate(found) if word == "mbarrier.arrive.shared"}
    assert before == {"bar.sync", "bar.warp.sync"}
    result = compile_check.check(variant, 90, "here")
    assert result.problems == [] and result.main_loop["matrix"] == 12 and result.main_loop["mufu"] > 32


# --- where it is used -------------------------------------------------------------------------------------------------


def named(table, keys=200):
    """Launch parameters that name the kernel for both head dims at about so many keys."""
    config = {"block_m": 128, "block_n": 64, "num_stages": 2}
    near = [{"shape": {"head_dim": dim, "bits": 16, "keys": keys}, "config": config} for dim in (64, 128)]
    far = [{"shape": {"head_dim": dim, "bits": 16, "keys": 20 * keys}, "config": None} for dim in (64, 128)]
    return table | {"attention_pingpong": near + far}


@pytest.fixture
def dry(tuned_dry_gpu):
    """A dry GPU whose file names the kernel."""

    def use(capability, **options):
        attention_launch._warn.cache_clear()
        return tuned_dry_gpu(capability, named, **options)

    return use


@pytest.mark.thorough
@needs_driver
def test_launches_of_any_layout(dry):
    from tests.kernels.test_dry_gpu import layouts, offsets

    with dry((9, 0)) as dry_run:
        for name, q, k, v in layouts():
            dry_run.clear()
            for _ in range(2):
                bias = torch.zeros(k.shape[:2])
                out, lse = kernels.mixed_attention(q, k, v, key_bias=bias, return_lse=True)
                kernels.mixed_attention(q, k, v)
            assert out.shape == q.shape and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
            plain = name == "no keys" or "stride-0" in name  # what no descriptor describes
            assert set(dry_run.kernels) == ({"attend" if plain else "attend_pingpong"} if q.numel() else set()), name
        for queries, keys in (([100], [70]), ([5, 0, 300], [0, 20, 150]), ([1, 2], [1, 0]), ([1] * 700, [1] * 700)):
            dry_run.clear()
            q, k = (torch.zeros(sum(n), 2, 128, dtype=BF16) for n in (queries, keys))
            for longest in (None, max(queries)):
                ends = {"cu_seqlens_q": offsets(*queries), "cu_seqlens_k": offsets(*keys), "max_seqlen_q": longest}
                kernels.mixed_attention(q, k, k, **ends)
            planned = ["plan_tiles"] if len(queries) > 1 else []
            assert dry_run.kernels == [*planned, "attend_pingpong"] * 2
        assert dry_run.errors == [] and dry_run.maps


@pytest.mark.thorough
@needs_driver
def test_a_launch_has_the_warps_and_the_memory_of_the_compiled_kernel(dry):
    """Two warpgroups, and a third one for the loading warp. A repeated launch is prepared, with Triton 3.7."""
    q = torch.zeros(1, 200, 2, 112, dtype=BF16)  # a head dim of its own, which no other test compiled without code
    with dry((9, 0), generates=True) as dry_run:
        for _ in range(3):
            kernels.mixed_attention(q, q, q)
        (line,) = set(dry_run.text)
    assert line.startswith("launch attend_pingpong grid 4 1 1 block 384 shared ") and int(line.split()[-1]) > 48 << 10


@pytest.mark.thorough
@needs_driver
def test_only_where_the_file_says_so(dry):
    """Other lengths, types, head dims, and lists of blocks have the plain kernel; a plan is made for whichever runs."""
    q = torch.zeros(1, 200, 2, 64, dtype=BF16)
    keep = kernels.BlockKeep.from_mask(torch.ones(4, 4, dtype=torch.bool), query_block=64, key_block=64)
    with dry((9, 0)) as dry_run:
        kernels.mixed_attention(q, q, q)
        kernels.mixed_attention(q.half(), q.half(), q.half())
        assert dry_run.kernels == ["attend_pingpong"] * 2
        dry_run.clear()
        long, wide = torch.zeros(1, 5000, 2, 64, dtype=BF16), torch.zeros(1, 200, 2, 256, dtype=BF16)
        for plain in (long, wide, q[..., :32], q.float()):
            kernels.mixed_attention(plain, plain, plain)
        kernels.mixed_attention(q, q, q, block_keep=keep)
        assert dry_run.kernels == ["attend"] * 5
        dry_run.clear()
        bias = torch.zeros(1, 200)
        plan = kernels.plan(total_q=200, total_k=200, head_dim=64, dtype=BF16, key_bias=bias, backend="triton")
        kernels.mixed_attention(q, q, q, plan=plan)
        assert dry_run.kernels == ["order_keys", "attend_pingpong"] and plan.tile_keys == 64
        dry_run.clear()
        two = torch.tensor([0, 90, 200], dtype=torch.int32)
        plan = kernels.plan(two, two, total_q=200, total_k=400, head_dim=64, dtype=BF16)
        assert plan.tile_rows == 128


def test_no_default_names_it():
    for path in launch.CONFIG_FOLDER.glob("default_*.json"):
        assert tune.PINGPONG not in json.loads(path.read_text())


@pytest.mark.thorough
@needs_driver
@pytest.mark.parametrize("capability", [(8, 0), (10, 0)], ids=str)
def test_elsewhere_the_plain_kernel_runs_with_one_warning(dry, capability):
    q = torch.zeros(1, 200, 2, 64, dtype=BF16)
    with dry(capability) as dry_run, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            kernels.mixed_attention(q, q, q)
            kernels.mixed_attention(q, q, q, scale=2.0)
        assert set(dry_run.kernels) == {"attend"}
        assert gpu.pingpong_shapes(CPU) == []
    (text,) = [str(one.message) for one in said if "attention_pingpong" in str(one.message)]
    arch = 10 * capability[0] + capability[1]
    assert f"does not run here: expected sm_90, got sm_{arch}. The plain kernel does." in text


def test_a_triton_without_its_gluon_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "specedit_kernels.gpu.attention_pingpong", None)
    monkeypatch.delattr(gpu, "attention_pingpong")
    attention_launch._why_no_gluon.cache_clear()
    assert "Gluon is another" in attention_launch._why_no_gluon()
    attention_launch._why_no_gluon.cache_clear()


# --- its check --------------------------------------------------------------------------------------------------------


def call():
    q, bias = torch.randn(1, 200, 2, 64).to(BF16), torch.zeros(1, 200)
    return lambda **more: kernels.mixed_attention(q, q, q, key_bias=bias, **more)


@pytest.mark.thorough
@needs_driver
def test_a_gpu_checks_it_before_its_use(dry):
    attend = call()
    with dry((9, 0), checks=True) as dry_run:
        attend()
        assert dry_run.kernels.count("attend_pingpong") == 8 + 1  # four calls for each head dim
        findings = [one for one in verdict.verdict(CPU).findings if one.kernel == ops.PINGPONG]
        assert len(findings) == 8 and all(one.passed for one in findings)
        assert verdict.attention_backend(CPU) == "triton"
        plan = kernels.plan(total_q=200, total_k=200, head_dim=64, dtype=BF16, key_bias=torch.zeros(1, 200))
        assert plan.tile_keys == 64


@pytest.mark.thorough
@needs_driver
def test_the_plain_kernel_takes_the_place_of_a_wrong_one(dry):
    attend = call()
    with dry((9, 0), checks=True, faulty=[ops.PINGPONG]) as dry_run, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = attend()
        torch.testing.assert_close(got, attend(backend="torch"))
        dry_run.clear()
        for backend in (None, "triton"):
            attend(backend=backend)
        assert dry_run.kernels == ["attend"] * 2
        plan = kernels.plan(total_q=200, total_k=200, head_dim=64, dtype=BF16, key_bias=torch.zeros(1, 200))
        assert plan.tile_keys == 128
        assert verdict.attention_backend(CPU) == "triton"
    (text,) = [str(one.message) for one in said if "failed their check" in str(one.message)]
    assert "pingpong (bfloat16, D=64, 193 keys, dense): error" in text
    assert "The plain kernel of attention takes the place of pingpong;" in text


@needs_driver
def test_the_check_sees_rows_of_other_sequences_and_hidden_keys(dry):
    """Its cases pass plain PyTorch, and have what the kernel might get wrong."""
    with dry((9, 0)):
        cases = list(pingpong_cases(CPU, BF16))
        assert len(cases) == 8
        for case in cases:
            finding = self_check.check(case, lambda backend, name, args: ops.run("torch", name, args))
            assert finding.passed and finding.kernel == ops.PINGPONG, str(finding)
        packed_case = next(case.args for case in cases if case.label.endswith("packed"))
        assert packed_case[1].isnan().any() and packed_case[6].isinf().any()


def test_no_case_without_a_file_that_names_it(monkeypatch):
    monkeypatch.setattr(attention_launch, "why_no_pingpong", lambda: None)
    assert list(pingpong_cases(CPU, BF16)) == []
