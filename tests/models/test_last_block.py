"""The hook on the last block: what it computes, and that it stays out of the way of what else acts on the block."""

import copy
from collections import Counter

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

import specedit
from specedit import SpecEditConfig
from specedit.models.attention import last_block
from specedit.models.attention.last_block import FluxLastBlock

STEPS = dict(steps=(1, 1, 1), draft_steps=1)
GUIDED = dict(negative_prompt="blue", true_cfg_scale=2.5)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def last(pipe):
    return (getattr(pipe.transformer, "single_transformer_blocks", None) or pipe.transformer.transformer_blocks)[-1]


def rows_seen(block, names):
    """Rows that modules of the block see, call by call."""
    seen = {name: [] for name in names}
    for name in names:
        block.get_submodule(name).register_forward_pre_hook(lambda m, args, n=name: seen[n].append(args[0].shape[1]))
    return seen


@pytest.fixture
def calls(pipe, edit, make_qwen, picture):
    """(pipeline, function that runs it) of each kind of last block."""

    def run_qwen(pipe, **more):
        generator = torch.Generator().manual_seed(0)
        return pipe(
            picture(), "make it red", height=128, width=128, output_type="latent", generator=generator, **more
        ).images  # fmt: skip

    return {"flux": (pipe, edit), "qwen": (make_qwen(), run_qwen)}


def test_flux_computes_the_targets_rows_alone(pipe, edit):
    specedit.install(pipe, **STEPS)
    seen = rows_seen(last(pipe), ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"])
    edit(pipe)
    stages = [stage for stage in specedit.report(pipe).stages if stage.steps]
    whole = [int(stage.tokens) for stage in stages]
    target = [(tokens - 16) // 2 for tokens in whole]
    assert [stage.name for stage in stages] == ["draft", "coarse", "mixed", "full"]
    assert seen["attn.to_q"] == seen["proj_mlp"] == seen["proj_out"] == target
    assert seen["attn.to_k"] == seen["attn.to_v"] == whole


def test_qwen_computes_the_targets_rows_alone(calls):
    pipe, run = calls["qwen"]
    specedit.install(pipe, **STEPS)
    names = ["attn.to_q", "attn.to_k", "attn.to_out.0", "img_mlp", "attn.add_k_proj"]
    unread = ["attn.add_q_proj", "attn.to_add_out", "txt_mlp"]
    seen = rows_seen(last(pipe), names + unread)
    run(pipe, **GUIDED)
    draft, coarse, mixed, full = seen["attn.to_q"]  # in a packed pass the targets of both halves lie side by side
    assert (draft, coarse, full) == (2 * 4, 2 * 16, 2 * 64) and coarse < mixed <= full
    assert seen["attn.to_q"] == seen["attn.to_out.0"] == seen["img_mlp"]
    assert seen["attn.to_k"] == [2 * rows for rows in seen["attn.to_q"]]  # target and reference
    assert all(rows > 0 for rows in seen["attn.add_k_proj"])
    assert not any(seen[name] for name in unread)


def test_with_stock_attention_every_row_is_computed(calls):
    for pipe, run in calls.values():
        specedit.install(pipe, attention="stock", **STEPS)
        name = "proj_mlp" if hasattr(last(pipe), "proj_mlp") else "img_mlp"
        seen = rows_seen(last(pipe), ["attn.to_k", name])
        run(pipe)
        assert seen["attn.to_k"] == seen[name]
        trimmed = specedit.report(pipe).flops
        specedit.install(pipe, attention="auto", **STEPS)
        run(pipe)
        assert specedit.report(pipe).flops < trimmed


def test_flops_of_a_full_stage_are_those_of_the_rows(pipe, edit):
    from specedit.cost.flops import transformer_flops

    specedit.install(pipe, steps=(0, 0, 3))
    edit(pipe)
    report = specedit.report(pipe)
    assert report.flops == 3 * transformer_flops(pipe.transformer.config, 144, None, 64)
    assert report.flops_stock == 28 * transformer_flops(pipe.transformer.config, 144)


def test_fused_projections(pipe, edit):
    specedit.install(pipe, **STEPS)
    expected = edit(pipe)
    pipe.transformer.fuse_qkv_projections()
    close(edit(pipe), expected)


def test_another_librarys_forward_is_left_alone(pipe, edit):
    specedit.install(pipe, **STEPS)
    expected, cheaper = edit(pipe), specedit.report(pipe).flops
    specedit.uninstall(pipe)
    block, called = last(pipe), Counter()
    original = block.forward

    def theirs(*args, **kwargs):
        called.update(["theirs"])
        return original(*args, **kwargs)

    block.forward = theirs
    specedit.install(pipe, **STEPS)
    assert block.forward is theirs and not last_block.attached(block)
    close(edit(pipe), expected)
    assert called["theirs"] == 4 and specedit.report(pipe).flops > cheaper  # it counts what was computed
    specedit.uninstall(pipe)
    assert block.forward is theirs


@pytest.mark.parametrize("first", [True, False])
def test_offloaded_group_by_group(pipe, edit, first):
    """Before or after install: the block's weights come to the device before anything of it runs."""
    expected = edit(specedit.install(pipe, **STEPS))
    if first:
        specedit.uninstall(pipe)
    cpu = torch.device("cpu")
    try:
        apply_group_offloading(pipe.transformer, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    except AttributeError:
        pytest.skip("this diffusers wants an accelerator for it")
    if first:
        specedit.install(pipe, **STEPS)
    close(edit(pipe), expected)


def test_offloaded_layer_by_layer(pipe, edit):
    """Each layer fetches the next: none may be left out."""
    expected, cheaper = edit(specedit.install(pipe, **STEPS)), specedit.report(pipe).flops
    cpu = torch.device("cpu")
    try:
        apply_group_offloading(pipe.transformer, cpu, cpu, offload_type="leaf_level")
    except AttributeError:
        pytest.skip("this diffusers wants an accelerator for it")
    assert last_block.attached(last(pipe)) and not last_block.trims(last(pipe))
    close(edit(pipe), expected)
    assert specedit.report(pipe).flops > cheaper


def test_offloaded_module_by_module(pipe, edit):
    from accelerate import cpu_offload

    expected = edit(specedit.install(pipe, **STEPS))
    cpu_offload(pipe.transformer, torch.device("cpu"))
    close(edit(pipe), expected)


def test_attach_and_detach(pipe):
    block = last(pipe)
    assert "forward" not in vars(block)
    for _ in range(2):
        last_block.attach(block, FluxSingleTransformerBlock, FluxLastBlock)
    hook = block.forward
    assert last_block.attached(block) and not isinstance(hook.stock, FluxLastBlock)
    last_block.detach(block)
    last_block.detach(block)
    assert "forward" not in vars(block) and not last_block.attached(block)
    last_block.attach(block, QwenImageTransformerBlock, last_block.QwenLastBlock)  # of another class
    assert not last_block.attached(block)


def test_a_copy_has_a_separate_hook(pipe):
    last_block.attach(last(pipe), FluxSingleTransformerBlock, FluxLastBlock)
    block = copy.deepcopy(last(pipe))
    assert last_block.attached(block) and block.forward.block is block and block.forward.stock.__self__ is block


def test_a_transformer_without_single_blocks(tiny_components):
    from specedit.models.flux import FluxKontext

    class Pipe:
        transformer = copy.deepcopy(tiny_components["transformer"])

    Pipe.transformer.single_transformer_blocks = torch.nn.ModuleList()
    adapter = FluxKontext()
    adapter.attach(Pipe)
    assert not adapter.trims_last_block(Pipe, SpecEditConfig())
    adapter.detach(Pipe)
