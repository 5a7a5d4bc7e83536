"""modulation="once": when it stands aside, and which passes it takes."""

import copy
import warnings

import pytest
import torch
from torch import nn

import specedit
from specedit.models.flux import FluxKontext
from specedit.models.shared.modulation import why_every_step

LAYERS = FluxKontext.modulation_layers
ONCE = dict(steps=(2, 2, 1), draft_steps=2, modulation="once")


@pytest.fixture
def transformer(make_pipe):
    """A copy of its own."""
    return copy.deepcopy(make_pipe().transformer)


class Quantised(nn.Linear):
    """Stands for another library's layer."""


def quantise(transformer):
    own = transformer.single_transformer_blocks[0].norm
    own.linear = Quantised(own.linear.in_features, own.linear.out_features)


def in_groups(transformer):
    transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "block_level", num_blocks_per_group=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (quantise, "the layers that make its modulation are quantised"),
        (in_groups, "its layers are offloaded in groups"),
        (lambda t: t.compile(), "the transformer is compiled, and its graph computes the modulation"),
        (
            lambda t: t.norm_out.linear.register_forward_hook(lambda *_: None),
            "hooks follow the layers that make the modulation",
        ),
        (
            lambda t: t.transformer_blocks[0].compile(),
            "its blocks are compiled, and their graphs compute the modulation",
        ),
        (lambda t: delattr(t, "norm_out"), "FluxTransformer2DModel makes its modulation elsewhere"),
    ],
)
def test_it_stands_aside_where_weights_are_not_plain(transformer, change, reason):
    assert why_every_step(transformer, LAYERS) is None
    change(transformer)
    assert why_every_step(transformer, LAYERS) == reason


def test_a_compiled_transformer_makes_its_own(transformer):
    compiled = torch.compile(transformer, backend="eager")
    assert "the transformer is compiled" in why_every_step(compiled, LAYERS)


def run(pipe, picture, **changes):
    return pipe(
        image=picture(), prompt="make it red", height=128, width=128, max_area=128 * 128, _auto_resize=False,
        max_sequence_length=16, output_type="latent", generator=torch.Generator().manual_seed(0), **changes,
    ).images  # fmt: skip


def test_a_callback_may_change_weights_so_every_step_makes_it(make_pipe, picture):
    pipe = specedit.install(make_pipe(), **ONCE)
    with pytest.warns(UserWarning, match="no effect: callback_on_step_end may change the transformer"):
        changed = run(pipe, picture, callback_on_step_end=lambda pipe, i, t, kwargs: kwargs)
    assert specedit.report(pipe).modulation == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (run(pipe, picture) - changed).abs().max() < 1e-4
    assert specedit.report(pipe).modulation["passes"] >= 1


def test_a_run_takes_two_passes(make_pipe, picture):
    """Of the coarse and the full stage, and of the mixed one, whose timesteps follow from what is edited."""
    pipe = specedit.install(make_pipe(), **ONCE)
    run(pipe, picture, edit_mask=torch.eye(8))
    assert specedit.report(pipe).modulation["passes"] == 2


def test_kept_bytes_are_times_blocks_chunks_and_width(make_pipe, picture):
    pipe = specedit.install(make_pipe(), **ONCE)
    run(pipe, picture, edit_mask=torch.eye(8))
    blocks = pipe.transformer.config
    chunks = 12 * blocks.num_layers + 3 * blocks.num_single_layers + 2 + 1  # and the embedding itself
    width = blocks.num_attention_heads * blocks.attention_head_dim
    assert specedit.report(pipe).modulation["bytes"] == 5 * chunks * width * 4


def test_other_methods_keep_it_too(make_pipe, picture):
    pipes = [
        specedit.install(make_pipe(), method=specedit.methods.Steps(count=3), modulation=m) for m in ("step", "once")
    ]
    step, once = (run(pipe, picture) for pipe in pipes)
    assert specedit.report(pipes[1]).modulation["passes"] == 1
    assert (step - once).abs().max() < 1e-4
    assert not any("forward" in vars(layer) for layer, _ in LAYERS.find(pipes[1].transformer))


def test_an_error_in_a_step_leaves_no_hook(make_pipe, picture):
    pipe = specedit.install(make_pipe(), **ONCE)
    handle = pipe.transformer.proj_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(pipe, picture)
    handle.remove()
    assert not any("forward" in vars(layer) for layer, _ in LAYERS.find(pipe.transformer))
