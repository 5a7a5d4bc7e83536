"""The edit that stands in for the draft's finding, and how pipelines are set up to be timed."""

import argparse

import pytest
import torch

import specedit
from benchmarks import editor_bench, real_models
from benchmarks.editor_bench import Bench, Case, edit_cells, fields, found


@pytest.mark.parametrize("shape", ["blob", "scattered"])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.4, 1.0])
def test_masks_have_exactly_their_share(shape, share):
    cells = edit_cells(share, shape, 32, 23)
    assert cells.shape == (32, 23) and cells.dtype == torch.bool
    assert cells.sum() == round(share * 32 * 23)
    assert torch.equal(cells, edit_cells(share, shape, 32, 23))
    assert share == 1 or not torch.equal(cells, edit_cells(share, shape, 32, 23, seed=1))


def test_blob_is_connected_and_scattered_cells_are_not():
    for shape, largest in (("blob", 1.0), ("scattered", 0.5)):
        cells = edit_cells(0.2, shape, 32, 32)
        piece = torch.zeros_like(cells)
        piece.view(-1)[cells.flatten().nonzero()[0]] = True
        for _ in range(64):  # grow inside the mask
            grown = torch.nn.functional.max_pool2d(piece[None, None].float(), 3, 1, 1)[0, 0] > 0
            piece = grown & cells
        share = (piece.sum() / cells.sum()).item()
        assert share == 1.0 if largest == 1.0 else share < largest


def test_draft_runs_and_the_given_mask_replaces_it(pipe, edit):
    specedit.install(pipe, "turbo")
    with found(0.25, "blob"):
        edit(pipe, prompt=["a", "b"])
    report = specedit.report(pipe)
    assert report.edit_fraction == 0.25 and report.draft_steps == 4 and report.score is not None
    assert {"draft", "verify"} <= {stage.name for stage in report.stages}
    assert not torch.equal(report.edit_mask[0], report.edit_mask[1])  # every sample has its own
    assert torch.equal(report.edit_mask[1], edit_cells(0.25, "blob", 4, 4, seed=1))
    edit(pipe)
    assert not torch.equal(specedit.report(pipe).edit_mask[0], report.edit_mask[0])  # outside nothing is replaced


@pytest.fixture
def bench():
    made = Bench(argparse.Namespace(tiny=True, repeat=1, enough=60), [])
    made.load("flux-kontext")
    return made


@pytest.mark.thorough
def test_compiling_is_undone(bench):
    block = bench.pipe.transformer.transformer_blocks[0]
    bench.execute("compiled")
    assert block._compiled_call_impl is not None
    bench.execute("eager")
    assert block._compiled_call_impl is None


@pytest.mark.thorough
def test_fastest_backend_is_found_once_and_set(bench, monkeypatch):
    case = Case("flux-kontext", 128, 128, 1, "eager")
    monkeypatch.setattr(editor_bench, "BACKENDS", ("native", "_native_math"))
    assert bench.attend(case) == "native"
    assert [b["fastest"] for b in bench.backends] == ["native"] and bench.backends[0]["seconds"]["native"] > 0
    bench.backends[0]["fastest"] = "_native_math"
    assert bench.attend(case) == "_native_math" and len(bench.backends) == 1
    processor = bench.pipe.transformer.transformer_blocks[0].attn.processor
    assert processor._attention_backend == "_native_math"


@pytest.mark.thorough
def test_loading_another_model_frees_the_first(bench):
    first = bench.pipe
    assert bench.load("flux-kontext") is first
    assert isinstance(bench.load("qwen-image-edit"), real_models.QwenImageEditPipeline)
    assert bench.model == "qwen-image-edit" and bench.execution == "eager"


def test_fields_of_a_configuration():
    assert fields("") == {}
    assert fields("reference_refresh=4  guidance_range=(0.2,0.9) draft_condition='small'") == dict(
        reference_refresh=4, guidance_range=(0.2, 0.9), draft_condition="small"
    )
    for wrong in ("reference_refresh", "guidance_range=(0.2, 0.9)", "restore=full"):
        with pytest.raises(ValueError, match="changes: expected name=value with a Python value, got"):
            fields(wrong)
