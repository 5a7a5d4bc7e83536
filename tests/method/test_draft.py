from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler

from specedit import SpecEditConfig
from specedit.geometry import PACKED, UNPACKED
from specedit.layout import TokenGrid
from specedit.method import draft as draft_module
from specedit.method.adapter import EditState, Run
from specedit.method.draft import shrink, small_reference, upsample
from specedit.method.schedule import stage_sigmas
from specedit.method.trace import ForwardCall, Trace
from specedit.placement import Placement

both = pytest.mark.parametrize("geometry", [PACKED, UNPACKED], ids=["packed", "unpacked"])


def pixels(tokens, grid):
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid.shape), grid.geometry.patch)


@both
@pytest.mark.parametrize("scale", [2, 4])
def test_shrink_averages_latent_pixels(scale, geometry):
    grid = TokenGrid(8, 12, geometry)
    tokens = torch.randn(2, grid.tokens, 8)
    small, smaller = shrink(tokens, grid, scale)
    assert smaller == TokenGrid(8 // scale, 12 // scale, geometry)
    torch.testing.assert_close(pixels(small, smaller), F.avg_pool2d(pixels(tokens, grid), scale))


def test_several_references_shrink_each_by_itself():
    grids = (TokenGrid(8, 12), TokenGrid(5, 4))
    tokens = torch.randn(2, sum(grid.tokens for grid in grids), 8)
    places = tuple(Placement(grids[0], grid, row, 0) for grid, row in zip(grids, (0, 3), strict=True))
    state = SimpleNamespace(
        references=tokens.split([grid.tokens for grid in grids], 1), placements=places, fixed_prefix=False
    )
    small = small_reference(state, 4)
    first, second = (shrink(one, grid, 4) for one, grid in zip(state.references, grids, strict=True))
    assert torch.equal(small[:, : first[1].tokens], first[0])
    # Three rows of the first cell lie before the second picture: its first row repeats there.
    second = state.references[1].view(2, 5, 4, 8)
    padded = torch.cat([second[:, :1].expand(-1, 3, -1, -1), second], 1).flatten(1, 2)
    assert torch.equal(small[:, first[1].tokens :], shrink(padded, TokenGrid(8, 4), 4)[0])


@both
@pytest.mark.parametrize("shape", [(8, 12), (7, 9)], ids=str)
@pytest.mark.parametrize("scale", [2, 4])
def test_upsample_is_bilinear_in_latent_pixels(scale, shape, geometry):
    target = TokenGrid(*shape, geometry)
    grid, patch = target.coarse(scale), geometry.patch
    tokens = torch.randn(2, grid.tokens, 8)
    height, width = patch * grid.height * scale, patch * grid.width * scale
    expected = F.interpolate(pixels(tokens, grid), size=(height, width), mode="bilinear")
    expected = expected[..., : patch * target.height, : patch * target.width]
    large = upsample(tokens, grid, scale, target)
    torch.testing.assert_close(pixels(large, target), expected)


class Recorder:
    """An adapter whose velocity is a constant; it remembers what it was asked."""

    fixed_reference = False

    def __init__(self, velocity):
        self.constant, self.calls = velocity, []

    def draft_state(self, run):
        return run.state

    def sigmas(self, pipe, *stage):
        return stage_sigmas(pipe.scheduler, *stage)

    def velocity(self, run, group, sigma):
        self.calls.append((sigma, group.rows, group.layout, group.reference, group.reference_layout))
        return torch.full_like(group.tokens, self.constant)


class Bar:
    """A progress bar that calls a function."""

    def __init__(self, function):
        self.update = function


def generate(adapter, state, config, on_step=None, pipe=None):
    """The draft, and the trace of its run."""
    pipe = pipe or PIPE
    run = Run(adapter, pipe, config, state, Trace(pipe, bar=Bar(on_step or (lambda: None))))
    return draft_module.generate(run), run.trace


def make_state(height=9, width=12):
    grid, reference_grid = TokenGrid(height, width), TokenGrid(8, 8)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, grid.tokens, 8, generator=generator)
    reference = torch.randn(2, reference_grid.tokens, 8, generator=generator)
    return EditState(
        grid=grid, noise=noise, reference=reference, reference_grid=reference_grid,
        placements=(Placement(grid, reference_grid),),
        generator=torch.Generator().manual_seed(7), text_tokens=5, branches=1, pixels_per_token=16,
    )  # fmt: skip


PIPE = SimpleNamespace(interrupt=False, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


@pytest.mark.parametrize("scale", [2, 4])
def test_the_draft_is_a_separate_small_image(scale):
    state, adapter, heard = make_state(), Recorder(0.5), []
    config = SpecEditConfig(draft_steps=5, draft_scale=scale)
    draft, trace = generate(adapter, state, config, lambda: heard.append(1))
    tokens, grid = draft.tokens, draft.layout.grid
    assert grid == state.grid.coarse(scale)
    assert draft.reference_layout.tokens == (8 // scale) ** 2
    whole = grid.tokens + (8 // scale) ** 2 + 5
    assert trace.calls == 5 * [ForwardCall("draft", whole, 5, samples=2)]
    assert [(row.name, row.steps, row.tokens) for row in trace.stages] == [("draft", 5, whole)]
    assert len(heard) == len(adapter.calls) == 5
    expected = stage_sigmas(PIPE.scheduler, grid.tokens, 1.0, 0.0, 5)
    assert [call[0] for call in adapter.calls] == expected[:-1].tolist()
    _, rows, layout, reference, reference_layout = adapter.calls[0]
    assert rows == [0, 1] and layout.is_fine and layout.grid == grid
    assert torch.equal(layout.positions, grid.positions())
    torch.testing.assert_close(
        pixels(reference, reference_layout.grid), F.avg_pool2d(pixels(state.reference, state.reference_grid), scale)
    )
    # from sigma 1 to 0 along a constant velocity; the noise is fresh from the caller's generator
    noise = torch.randn(2, grid.tokens, 8, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(tokens, noise - 0.5)


def test_an_interrupt_ends_the_draft():
    pipe = SimpleNamespace(interrupt=False, scheduler=PIPE.scheduler)
    adapter = Recorder(0.0)

    def stop():
        pipe.interrupt = len(adapter.calls) == 2

    _, trace = generate(adapter, make_state(), SpecEditConfig(), stop, pipe)
    assert len(adapter.calls) == trace.stages[0].steps == 2
