"""Compiled blocks: few graphs for every size, batch, mask and stage, and stock calls beside them."""

from collections import Counter

import pytest
import torch
from diffusers import QwenImageEditPipeline
from torch._guards import CompileContext

import specedit
from specedit.models.attention import compiled
from specedit.models.flux import FluxKontext
from specedit.models.longcat import LongCatImageEdit
from specedit.models.qwen.edit import QwenImageEdit
from specedit.testing import Family

GRAPHS = 6  # of one block's code; 8 is the compiler's own limit
SIZES = ((128, 128), (160, 96), (96, 192))
QUICK = dict(steps=(2, 1, 1), draft_steps=2)
EDITS = {  # settings, and batches of the edits
    "flux": (QUICK, (1, 2, 3, 2, 3, 1)),
    "qwen": (QUICK | dict(rope="phase_aligned"), (1,) * 6),
}


@pytest.fixture
def flux(make_pipe, picture):
    def call(height, width):
        return dict(
            image=picture(height, width), prompt="red", height=height, width=width, max_area=height * width,
            _auto_resize=False, max_sequence_length=16,
        )  # fmt: skip

    return Family(FluxKontext, make_pipe, call, guided=dict(negative_prompt="blue", true_cfg_scale=2.5))


@pytest.fixture
def qwen(make_qwen, picture):
    def call(height, width):
        return dict(image=picture(height, width), prompt="make it red", height=height, width=width, true_cfg_scale=1.0)

    guided = dict(negative_prompt="blue and dark", true_cfg_scale=2.5)
    return Family(QwenImageEdit, lambda: make_qwen(QwenImageEditPipeline), call, guided=guided)


@pytest.fixture
def longcat(make_longcat, picture):
    def call(height, width):
        return dict(image=picture(height, width), prompt="make it red", guidance_scale=1.0)

    return Family(LongCatImageEdit, make_longcat, call, guided=dict(negative_prompt="blue", guidance_scale=2.5))


with_longcat = pytest.param(
    "longcat", marks=pytest.mark.skipif(LongCatImageEdit is None, reason="this diffusers has no LongCat")
)


@pytest.fixture(params=["flux", "qwen", with_longcat])
def family(request):
    return request.getfixturevalue(request.param)


def deeper(pipe):
    """The pipeline with two blocks of every kind: the first one's inputs have other strides than the others'."""
    torch.manual_seed(0)
    config = {
        name: 2 if name in ("num_layers", "num_single_layers") else n for name, n in pipe.transformer.config.items()
    }
    pipe.transformer = type(pipe.transformer).from_config(config).eval()
    return pipe


def compile_blocks(pipe):
    """Compile as the guide says; how many graphs each frame of code has."""
    graphs = Counter()

    def backend(module, inputs):
        graphs[CompileContext.current_compile_id().frame_id] += 1
        return module.forward

    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    return graphs


def mask(size, cells, batch):
    """Another number of edited cells in every sample."""
    height, width = (side // 32 for side in size)
    return torch.stack([(torch.arange(height * width) < cells + i).view(height, width) for i in range(batch)])


@pytest.mark.thorough
@pytest.mark.parametrize("name", EDITS)
@torch._dynamo.config.patch(recompile_limit=8)
def test_edits_share_few_graphs_and_stock_calls_beside_them_are_stocks(request, name):
    """Blocks of one class share their compiled code; the last one must not be taken for any of the others."""
    family, (settings, batches) = request.getfixturevalue(name), EDITS[name]
    pipe = deeper(family.make())
    calls = [  # a size for each number of pictures, at most two
        dict(size=size, num_inference_steps=2, num_images_per_prompt=batch)
        for batch, size in zip(sorted(set(batches)), SIZES[:2])
    ]
    expected = [family.run(pipe, **call) for call in calls]
    one = dict(num_images_per_prompt=batches[0])
    eager = family.run(specedit.install(pipe, **settings), **one)
    specedit.uninstall(pipe)
    graphs = compile_blocks(pipe)
    assert torch.equal(family.run(pipe, **calls[0]), expected[0])
    graphs.clear()
    specedit.install(pipe, **settings)
    edited = family.run(pipe, **one)
    assert graphs and not torch.equal(edited, expected[0])
    torch.testing.assert_close(edited, eager, rtol=1e-4, atol=1e-4)
    # Every batch and every size, without guidance and with it, and no two of them twice.
    for i, batch in enumerate(batches):
        size, guide = SIZES[i % 3], [{}, family.guided][i // 3]
        for edit_mask in (None, mask(size, 3 + i % 3, batch)):
            family.run(pipe, size, num_images_per_prompt=batch, edit_mask=edit_mask, **guide)
    assert max(graphs.values()) <= GRAPHS, graphs
    total = graphs.total()
    for cells in (2, 4, 6):
        family.run(pipe, SIZES[0], edit_mask=mask(SIZES[0], cells, batches[0]), **one)
    assert graphs.total() == total
    with specedit.disabled(pipe):  # stock calls find room beside them
        for call, stock in zip(calls, expected, strict=True):
            assert torch.equal(family.run(pipe, **call), stock)
    specedit.uninstall(pipe)
    assert torch.equal(family.run(pipe, **calls[0]), expected[0])


def test_compiled_calls_are_wrapped_once_and_put_back(family):
    pipe = family.make()
    pipe.transformer.compile_repeated_blocks(backend="eager")
    blocks = compiled.blocks(pipe.transformer)
    before = [block._compiled_call_impl for block in blocks]
    adapter = family.adapter()
    for _ in range(2):
        adapter.attach(pipe)
        assert all(isinstance(block._compiled_call_impl, compiled.CompiledBlock) for block in blocks)
        assert all(a._compiled_call_impl.compiled is b for a, b in zip(blocks, before, strict=True))
    adapter.detach(pipe)
    assert all(a._compiled_call_impl is b for a, b in zip(blocks, before, strict=True))


def test_unviewed_states_have_the_strides_of_a_new_tensor():
    whole = torch.arange(60.0).view(2, 5, 6)
    for view in (whole[:, 2:], whole[:1, 2:], whole.flatten(0, 1)[None], whole):
        got = compiled.unviewed(view)
        assert torch.equal(got, view) and not got._is_view() and got.stride() == torch.empty(view.shape).stride()


@pytest.mark.slow
@pytest.mark.skipif(LongCatImageEdit is None, reason="this diffusers has no LongCat")
@torch._dynamo.config.patch(recompile_limit=8)
def test_an_installed_longcats_stock_call_compiles_whole(longcat):
    pipe = longcat.make()
    call = dict(num_inference_steps=1)
    expected = longcat.run(pipe, **call)
    torch._dynamo.reset()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    specedit.install(pipe, **QUICK)
    with specedit.disabled(pipe):
        assert torch.equal(longcat.run(pipe, **call), expected)
