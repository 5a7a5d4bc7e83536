"""Tuning: what it tries, what it keeps, and the file it writes."""

import importlib.util
import json

import pytest
import torch

from specedit_kernels import available_backends, tune

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from specedit_kernels.gpu import launch


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_every_kernel_gets_candidates(capability):
    default = json.loads((launch.CONFIG_FOLDER / launch.default_file_name(capability)).read_text())
    names = set()
    for kernel, shape in tune.shapes(capability, quick=False):
        names.add(kernel)
        configs = list(tune.candidates(kernel, shape))
        wanted = {"block_m", "block_n", "num_stages"}  # of the ping-pong kernel, which no default names
        if kernel != tune.PINGPONG:
            wanted = launch.nearest(default[kernel], shape).keys()
        assert len(configs) > 1 and all(config.keys() - {"masked_tail"} == wanted for config in configs)
    rivals = {tune.PINGPONG} if capability == (9, 0) else set()
    assert names == (default.keys() - {"gpu", "capability", "measured"}) | rivals


@pytest.mark.parametrize("times, named", [({"attention_tma": 2.0, tune.PINGPONG: 1.0}, True),
                                          ({"attention_tma": 1.0, tune.PINGPONG: 2.0}, False)])  # fmt: skip
def test_the_pingpong_kernel_is_named_where_it_is_faster(monkeypatch, times, named):
    """It is tried last, after what was found so far has been saved."""
    shape, saved = {"head_dim": 128, "bits": 16, "keys": 2560}, []
    monkeypatch.setattr(tune, "shapes", lambda capability, quick: [(kernel, shape) for kernel in times])
    monkeypatch.setattr(tune, "workload", lambda kernel, *_: (None, None))
    monkeypatch.setattr(tune, "split", lambda kernel, shape, config, *_: config)
    monkeypatch.setattr(tune, "best", lambda kernel, call, want, configs, timer: (times[kernel], next(iter(configs))))
    tables = tune.tune((9, 0), "cpu", None, True, lambda tables: saved.append(dict(tables)))
    config = launch.nearest(tables[tune.PINGPONG], shape)
    assert config == (next(tune.candidates(tune.PINGPONG, shape)) if named else None)
    assert [tables.keys() for tables in saved] == [{"attention_tma"}]


def test_what_was_found_is_written_before_a_kernel_that_might_hang(monkeypatch, tmp_path):
    shape, file = {"head_dim": 128, "bits": 16, "keys": 2560}, tmp_path / "gpu.json"
    found = {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2}

    def best(kernel, call, want, configs, timer):
        if kernel == tune.PINGPONG:
            raise KeyboardInterrupt
        return 1.0, found

    for name, value in (("is_available", True), ("get_device_name", "Imaginary"), ("get_device_capability", (9, 0))):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(tune, "shapes", lambda capability, quick: [("attention_tma", shape), (tune.PINGPONG, shape)])
    monkeypatch.setattr(tune, "workload", lambda kernel, *_: (None, None))
    monkeypatch.setattr(tune, "split", lambda kernel, shape, config, *_: config)
    monkeypatch.setattr(tune, "best", best)
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--out", str(file)])
    written = json.loads(file.read_text())
    assert written["gpu"] == "Imaginary" and {"shape": shape, "config": found} in written["attention_tma"]
    assert "attention" in written and tune.PINGPONG not in written  # completed with the defaults


def test_fastest_correct_config_wins():
    want = torch.ones(4)
    results = {1: want, 2: want * 2, 3: want, 4: want * float("nan")}
    times = {1: 5.0, 3: 2.0}

    def call(config):
        if config["id"] == 5:
            raise RuntimeError("out of resources")
        ran.append(config["id"])
        return results[config["id"]]

    ran = []

    def timer(run):
        run()
        return times[ran[-1]]

    configs = [{"id": i} for i in (1, 2, 3, 4, 5)]
    assert tune.best("copy_rows", call, want, configs, timer) == (2.0, {"id": 3})
    assert tune.best("copy_rows", call, want, configs[3:], timer) is None


def test_wrong_result_of_small_values_is_rejected():
    """The error counts against the size of the result: attention over thousands of keys gives small values."""
    want = torch.full((4,), 0.01)
    assert tune.best("attention", lambda config: torch.zeros(4), want, [{"id": 1}], lambda run: 1.0) is None


def test_unmeasured_entries_keep_the_default():
    def entry(dim, **config):
        return {"shape": {"head_dim": dim, "bits": 16}, "config": config}

    tables = {"attention": [entry(64, block_m=1), entry(128, block_m=2)]}
    copied = {"shape": {"row_bytes": 128}, "config": {"num_warps": 4}}
    tune.complete(tables, {"attention": [entry(64, block_m=3), entry(256, block_m=4)], "copy_rows": [copied]})
    assert tables["attention"] == [entry(64, block_m=1), entry(128, block_m=2), entry(256, block_m=4)]
    assert tables["copy_rows"] == [copied]


def test_the_file_can_be_read_back(tmp_path):
    tables = {"expand": [{"shape": {"channels": 16}, "config": {"tile_pixels": 512, "num_warps": 4}}]}
    tune.write(tmp_path / "gpu.json", {"gpu": "x", "capability": [9, 0], "measured": True}, tables)
    read = json.loads((tmp_path / "gpu.json").read_text())
    assert read["gpu"] == "x" and read["expand"] == tables["expand"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_no_gpu(capsys):
    assert tune.main([]) == 2
    assert "expected a CUDA GPU" in capsys.readouterr().err


@pytest.mark.skipif("triton" not in available_backends(), reason="needs a GPU or Triton's interpreter")
@pytest.mark.parametrize(
    "kernel,shape",
    [("contract", {"channels": 4}), ("expand", {"channels": 4}), ("copy_rows", {"row_bytes": 128}),
     ("norm_rope", {"head_dim": 64}), ("attention", {"head_dim": 64, "bits": 16, "keys": 40})],
    ids=str,
)  # fmt: skip
def test_workloads_run(device, kernel, shape):
    """The smallest candidate of each kernel on a small workload is accepted as right."""
    call, want = tune.workload(kernel, shape, device.type, half=torch.float16, rows=64)
    config = next(tune.candidates(kernel, shape))
    assert tune.best(kernel, call, want, [config], lambda run: 1.0) == (1.0, config)
