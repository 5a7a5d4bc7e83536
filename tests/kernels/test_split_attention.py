"""The last round of a launch, split along the keys: where it is split, and that nothing else changes."""

import importlib.util
import itertools
import json
import math

import pytest
import torch

from specedit_kernels import available_backends, mixed_attention

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

import specedit_kernels as kernels
from benchmarks import dry_gpu
from specedit_kernels import gpu, tune, verdict
from specedit_kernels.gpu import attention_split, launch
from specedit_kernels.gpu.attention_split import Split, split_of
from tests.kernels.test_attention import softmax_attention

runs_kernels = pytest.mark.skipif("triton" not in available_backends(), reason="needs a GPU or the interpreter")
needs_driver = pytest.mark.skipif(bool(dry_gpu.missing()), reason=str(dry_gpu.missing()))
TILE = {"block_m": 16, "block_n": 16, "num_warps": 4, "num_stages": 2, "resident": 1}
HIDDEN = -math.inf


@pytest.mark.parametrize(
    "programs, slots, key_blocks, split",
    [
        (288, 132, 24, Split(264, 24, 5)),  # 1,536 tokens, 24 heads, tiles of 128 x 64 on 132 processors
        (24, 132, 100, Split(0, 24, 5)),  # less than one round
        (1, 132, 100, Split(0, 1, 8)),  # never more than 8 parts
        (288, 132, 11, Split(264, 24, 2)),  # as many parts as keep four blocks each
        (288, 132, 7, None),
        (264, 132, 24, None),  # full rounds
        (200, 132, 24, None),  # the last round is half full: two parts would not fit
        (132 * 20 + 10, 132, 24, None),  # one round of twenty-one is not worth a second launch
        (0, 132, 24, None),
    ],
)
def test_the_last_round_is_split_where_it_pays(programs, slots, key_blocks, split):
    assert split_of(programs, slots, key_blocks) == split


@pytest.mark.parametrize("programs", range(1, 200, 7))
def test_a_split_round_fits_the_processors_and_saves_time(programs):
    slots, blocks = 36, 64
    if (split := split_of(programs, slots, blocks)) is None:
        return
    assert split.start % slots == 0 and split.start + split.blocks == programs
    assert split.blocks * split.parts <= slots and blocks // split.parts >= attention_split.LEAST_BLOCKS
    assert split.start // slots + 1 / split.parts < (1 - attention_split.WORTH + 1e-9) * -(-programs // slots)


@pytest.fixture
def joined(monkeypatch):
    """How many launches joined parts."""
    calls, stock = [], attention_split.Parts.join

    def join(self, *arguments):
        calls.append(self)
        stock(self, *arguments)

    monkeypatch.setattr(attention_split.Parts, "join", join)
    return calls


def short_round(device, heads=1):
    """Queries whose tiles, over all heads, fill a round or more and at most half of the last one."""
    slots = launch.processors(device)
    return next(16 * n - 9 for n in itertools.count(1) if heads * n > slots and 0 < heads * n % slots <= slots // 2)


def biases(keys, generator):
    """None, one that hides the keys of a whole part and more, and runs of one value with others between."""
    hidden = torch.randn(keys, generator=generator)
    hidden[: keys // 2] = HIDDEN
    runs = torch.zeros(keys)
    runs[keys // 3 :] = math.log(4)
    runs[-40::3] = HIDDEN
    return {"no bias": None, "hidden": hidden, "runs": runs}


@runs_kernels
@pytest.mark.parametrize(
    "kernel, tail, kind",
    [("attention", {}, "runs"), ("attention", {"masked_tail": 1}, "no bias"), ("attention_tma", {}, "hidden"),
     ("attention_tma", {}, "no bias"), ("attention_tma", {"masked_tail": 1}, "runs")],
)  # fmt: skip
def test_a_split_round_gives_what_attention_gives(device, rng, as_good, joined, kernel, tail, kind):
    if device.type == "cuda" and kernel == "attention_tma" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs TMA")
    dtype, queries, keys = torch.float16, short_round(device), 203
    q, k, v = (torch.randn(1, n, 1, 32, generator=rng).to(device, dtype) for n in (queries, keys, keys))
    bias = biases(keys, rng)[kind]
    on_device = None if bias is None else bias[None].to(device)
    tuned = {kernel: TILE | tail}
    tuned.setdefault("attention", tuned[kernel])
    out, lse = gpu.run("mixed_attention", (q, k, v, None, None, None, on_device, 0.2, True), tuned)
    assert len(joined) == 1
    (exact, exact_lse), (same, same_lse) = (
        softmax_attention(q[0].cpu(), k[0].cpu(), v[0].cpu(), bias, 0.2, one) for one in (torch.float64, dtype)
    )
    as_good(out[0].cpu(), exact, same)
    as_good(lse[0].cpu(), exact_lse, same_lse)
    only, _ = gpu.run("mixed_attention", (q, k, v, None, None, None, on_device, 0.2, False), tuned)
    assert torch.equal(only, out)


@runs_kernels
def test_samples_heads_and_shared_keys(device, rng, as_good, joined, dtype):
    """Two samples of three heads that read one key head, of a head dim below a power of two."""
    queries, keys = short_round(device, heads=6), 150
    sizes = ((queries, 3), (keys, 1), (keys, 1))
    q, k, v = (torch.randn(2, n, heads, 48, generator=rng).to(device, dtype) for n, heads in sizes)
    bias = torch.stack([torch.zeros(keys), torch.full((keys,), HIDDEN)]).to(device)
    out, lse = gpu.run("mixed_attention", (q, k, v, None, None, None, bias, 0.2, True), {"attention": TILE})
    assert len(joined) == 1
    for b in range(2):
        wide = [x[b].cpu().repeat_interleave(3, dim=1) for x in (k, v)]
        (exact, exact_lse), (same, same_lse) = (
            softmax_attention(q[b].cpu(), *wide, bias[b].cpu(), 0.2, one) for one in (torch.float64, dtype)
        )
        as_good(out[b].cpu(), exact, same)
        as_good(lse[b].cpu(), exact_lse, same_lse)
    assert not out[1].any() and (lse[1] == HIDDEN).all()  # its keys are all hidden


@runs_kernels
def test_one_packed_sequence_is_split_and_several_are_not(device, rng, as_good, joined):
    """Only the device knows how long each of several is. Rows outside of the sequence are never read or written."""
    queries, keys, left = short_round(device), 180, 5
    q, k, v = (torch.randn(n, 1, 32, generator=rng).to(device) for n in (queries, keys, keys))
    k[-left:], v[-left:] = math.nan, math.nan
    tuned = {"attention": TILE}
    ends = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (queries, keys - left)]
    out, lse = gpu.run("mixed_attention", (q, k, v, *ends, queries, None, 0.2, True), tuned)
    assert len(joined) == 1
    seen = q.cpu(), k[:-left].cpu(), v[:-left].cpu(), None, 0.2
    (exact, exact_lse), (same, same_lse) = (softmax_attention(*seen, one) for one in (torch.float64, torch.float32))
    as_good(out.cpu(), exact, same)
    as_good(lse.cpu(), exact_lse, same_lse)
    ends = [torch.tensor([0, 9, n], dtype=torch.int32, device=device) for n in (queries, keys - left)]
    out, _ = gpu.run("mixed_attention", (q, k, v, *ends, queries, None, 0.2, False), tuned)
    assert len(joined) == 1 and out.isfinite().all()


@runs_kernels
def test_a_plans_order_of_keys_is_shared_among_the_parts(device, rng, as_good, joined, monkeypatch):
    entry = {"shape": {"head_dim": 32, "bits": 32}, "config": TILE}
    monkeypatch.setattr(launch, "config", lambda kernel, *_, **__: entry["config"] if kernel == "attention" else None)
    queries, keys = short_round(device), 203
    q, k, v = (torch.randn(1, n, 1, 32, generator=rng).to(device) for n in (queries, keys, keys))
    for bias in list(biases(keys, rng).values())[1:]:
        plan = gpu.plan(None, None, bias[None].to(device), queries, keys, None, 32, torch.float32)
        assert int(plan[3].sum()) > 2  # blocks in the plan's order
        arguments = (q, k, v, None, None, None, bias[None].to(device), 0.2, True, None, None, 0, 0, *plan)
        out, lse = gpu.run("mixed_attention", arguments)
        (exact, exact_lse), (same, same_lse) = (
            softmax_attention(q[0].cpu(), k[0].cpu(), v[0].cpu(), bias, 0.2, one)
            for one in (torch.float64, torch.float32)
        )
        as_good(out[0].cpu(), exact, same)
        as_good(lse[0].cpu(), exact_lse, same_lse)
    assert len(joined) == 2


@runs_kernels
def test_lists_of_blocks_are_not_split(device, rng, joined):
    q = torch.randn(1, short_round(device), 1, 32, generator=rng).to(device)
    blocks = -(-q.shape[1] // 64)
    keep = kernels.BlockKeep.from_mask(torch.ones(blocks, blocks, dtype=torch.bool, device=device), query_block=64,
                                       key_block=64)  # fmt: skip
    lists = (keep.offsets, keep.blocks, 64, 64)
    out, _ = gpu.run("mixed_attention", (q, q, q, None, None, None, None, 0.2, False, *lists), {"attention": TILE})
    torch.testing.assert_close(out, mixed_attention(q, q, q, scale=0.2, backend="torch"))
    assert not joined


# --- where it is used -------------------------------------------------------------------------------------------------


def one_resident(table):
    """Launch parameters that say how many programs run at once on a processor."""
    for entry in (*table["attention"], *table.get("attention_tma", [])):
        entry["config"]["resident"] = 1
    return table


@pytest.fixture
def dry(tuned_dry_gpu):
    """A dry GPU whose file asks for a split."""
    return lambda capability, **options: tuned_dry_gpu(capability, one_resident, **options)


@needs_driver
@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=str)
def test_launches_of_a_short_round(dry, capability):
    """Through Triton's own launcher, at any layout; a repeated call compiles nothing."""
    with dry(capability) as dry_run:
        q = torch.zeros(1, 1536, 24, 128, dtype=torch.bfloat16)
        heads_first = torch.zeros(1, 24, 1536, 128, dtype=torch.bfloat16).transpose(1, 2)
        for tensor in (q, heads_first, torch.zeros(1, 1536, 24, 256, dtype=torch.bfloat16)[..., ::2]):
            for bias in (None, torch.zeros(1, 1536)):
                for _ in range(2):
                    kernels.mixed_attention(tensor, tensor, tensor, key_bias=bias, return_lse=bias is not None)
        assert dry_run.kernels == ["attend", "join_parts"] * 12 and dry_run.errors == []
        compiled = len(dry_run.compiled)
        for tokens in (1500, 1450):
            tensor = torch.zeros(1, tokens, 24, 128, dtype=torch.bfloat16)
            kernels.mixed_attention(tensor, tensor, tensor)
        assert len(dry_run.compiled) == compiled
        dry_run.clear()
        kernels.mixed_attention(q[:, :1408], q, q)  # 264 programs: two full rounds
        wide = torch.zeros(1, 1536, 24, 256, dtype=torch.bfloat16)  # no registers are left for a split
        kernels.mixed_attention(wide, wide, wide)
        assert dry_run.kernels == ["attend"] * 2


def test_no_default_splits():
    """It is used where a GPU's own file says so, as measured."""
    for path in launch.CONFIG_FOLDER.glob("default_*.json"):
        table = json.loads(path.read_text())
        entries = table["attention"] + table.get("attention_tma", [])
        assert entries and not any("resident" in entry["config"] for entry in entries)


@needs_driver
@pytest.mark.slow
def test_a_gpu_checks_it_before_its_use(dry, monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda device: 8)  # of many, a short round has long sequences
    q = torch.zeros(1, 200, 2, 64, dtype=torch.bfloat16)
    with dry((9, 0), checks=True) as dry_run:
        kernels.mixed_attention(q, q, q)
        findings = [one for one in verdict.verdict(torch.device("cpu")).findings if "split" in one.label]
        assert len(findings) == 8 and all(one.passed for one in findings)  # four tiles, with a plan and without
        assert "join_parts" in dry_run.kernels


@pytest.mark.parametrize("faster", [0, 1, 2])
def test_the_tuner_keeps_what_is_faster(monkeypatch, faster):
    """`faster` programs at once on a processor; 0: not to split. Only short last rounds are timed."""
    shape, config = {"head_dim": 128, "bits": 16, "keys": 1536}, {"block_m": 128, "block_n": 64}
    timed = []

    def best(kernel, call, want, configs, timer):
        (one,) = configs
        return 0.5 if faster and one.get("resident") == faster else 1.0, one

    monkeypatch.setattr(launch, "processors", lambda device: 132)
    monkeypatch.setattr(tune, "workload", lambda kernel, shape, device: (timed.append(shape["queries"]), None))
    monkeypatch.setattr(tune, "best", best)
    kept = tune.split("attention_tma", shape, config, "cpu", None)
    assert kept == config | ({"resident": faster} if faster else {})
    assert len(timed) == 2 and all(
        split_of(24 * -(-queries // 128), slots, 24) for queries, slots in zip(timed, (132, 264), strict=True)
    )


@runs_kernels
def test_the_tuners_workload_takes_fewer_queries_than_keys(device):
    shape = {"head_dim": 64, "bits": 16, "keys": 30, "queries": 20}
    call, want = tune.workload("attention", shape, device.type, half=torch.float16)
    assert tuple(want.shape[:2]) == (1, 20)
    assert tune.best("attention", call, want, [TILE], lambda run: 1.0) == (1.0, TILE)
