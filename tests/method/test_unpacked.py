"""The whole method with a model that knows its answer, on packed and on unpacked tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler

from specedit import SpecEditConfig
from specedit.geometry import PACKED, UNPACKED
from specedit.layout import MixedLayout, TokenGrid, mean_pixels
from specedit.method import sampler
from specedit.method.adapter import Adapter, EditState, Run
from specedit.method.draft import shrink
from specedit.method.expand import coarsen_noise
from specedit.method.selectors import select
from specedit.method.selectors.semantic import beside
from specedit.placement import Placement

CHANNELS = 8
PIPE = SimpleNamespace(
    interrupt=False, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    transformer=SimpleNamespace(config=dict(num_layers=2, num_attention_heads=2, attention_head_dim=4)),
)  # fmt: skip
both = pytest.mark.parametrize("geometry", [PACKED, UNPACKED], ids=["packed", "unpacked"])
shapes = pytest.mark.parametrize("shape", [(8, 12), (7, 9)], ids=str)


class Oracle(Adapter):
    """Its velocity always points from where a state is to `target`, at every token's own resolution.

    seen: layout, tokens and noise level of every call. Its features are the latents themselves.
    """

    name, pipelines = "oracle", "none"

    def __init__(self, target, geometry):
        self.target, self.geometry, self.seen = target, geometry, []

    def predict(self, run, group, sigma, partial=None):
        self.seen.append((group.layout, group.tokens, sigma))
        grid, target = run.state.grid, self.target[group.rows]
        while group.layout.grid != grid:  # a draft, whose picture is a small one
            target, grid = mean_pixels(target, grid), grid.coarse()
        return [(group.tokens - group.layout.from_full_grid(target)) / sigma]

    def guide(self, run, outputs):
        return outputs[0]

    def features(self, pipe, tokens, grid):
        return [F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid.shape), grid.geometry.patch)]

    matches = refusal = prepare = reference_offset = call_size = decode = output = attach = detach = None


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_run(shape, geometry, target=None, **options):
    grid = TokenGrid(*shape, geometry)
    state = EditState(
        grid=grid, noise=normal(2, grid.tokens, CHANNELS), reference=normal(2, grid.tokens, CHANNELS, seed=1),
        reference_grid=grid, generator=torch.Generator().manual_seed(7), text_tokens=5, branches=1, pixels_per_token=16,
    )  # fmt: skip
    return Run(Oracle(state.reference if target is None else target, geometry), PIPE, SpecEditConfig(**options), state)


def edit(run, mask=None):
    with torch.no_grad():
        return sampler.edit(run, mask)


def centre(grid):
    """A mask of the cells in the middle, one sample for each token, and the tokens of those cells (N,) bool."""
    mask = np.zeros(grid.shape, dtype=bool)
    mask[2:4, 2:6] = True
    return mask, torch.from_numpy(mask).flatten()


@both
@shapes
def test_with_everything_expanded_a_run_sees_the_calls_own_noise(shape, geometry):
    """The coarse stage starts from the sum coefficient, and the expansion brings back the other three."""
    nothing = torch.zeros(2, shape[0] * shape[1], CHANNELS)
    run = make_run(shape, geometry, nothing, steps=(2, 0, 2), boundaries=(0.6, 0.3))
    edit(run, np.ones(shape, dtype=bool))
    noise, seen = run.state.noise, run.adapter.seen
    layout, tokens, sigma = seen[0]
    assert layout.is_coarse and sigma == 1
    torch.testing.assert_close(tokens, coarsen_noise(noise, run.state.grid))
    layout, tokens, sigma = next(call for call in seen if call[0].is_fine)
    assert sigma == pytest.approx(1.2 / 1.6)
    torch.testing.assert_close(tokens, sigma * noise)
    without_coarse = make_run(shape, geometry, nothing, steps=(0, 2, 2))
    edit(without_coarse, np.ones(shape, dtype=bool))
    assert torch.equal(without_coarse.adapter.seen[0][1], noise)


@both
@shapes
@pytest.mark.parametrize("restore", ["full", "reference"])
def test_an_edit_ends_at_the_models_answer(shape, geometry, restore):
    run = make_run(shape, geometry, normal(2, shape[0] * shape[1], CHANNELS, seed=3), steps=(2, 2, 2), restore=restore)
    mask, edited = centre(run.state.grid)
    tokens = edit(run, mask).tokens
    assert any(layout.is_mixed for layout, *_ in run.adapter.seen)
    if restore == "full":
        torch.testing.assert_close(tokens, run.adapter.target)
        return
    assert torch.equal(tokens[:, ~edited], run.state.reference[:, ~edited])
    if geometry == UNPACKED:  # packed, the outermost pixels of the edit are blended
        torch.testing.assert_close(tokens[:, edited], run.adapter.target[:, edited])
    else:
        assert not torch.equal(tokens[:, edited], run.state.reference[:, edited])


@both
@shapes
@pytest.mark.parametrize("verify_at", ["full", "draft"])
def test_a_draft_finds_what_the_model_changes(shape, geometry, verify_at):
    run = make_run(shape, geometry, steps=(2, 2, 2), draft_scale=2, dilation=0, verify_at=verify_at, threshold=0.75)
    smooth = torch.ones_like(run.state.reference)
    run.state.reference.copy_(smooth)
    run.adapter.target = smooth.clone()
    mask, edited = centre(run.state.grid)
    run.adapter.target[:, edited] = -1.0
    outcome = edit(run)
    assert (outcome.score.flatten(1)[:, edited] > 2).all()
    cells = F.max_pool2d(torch.from_numpy(mask)[None].float(), 2, ceil_mode=True) > 0
    found = select(run, *shrink(run.adapter.target, run.state.grid, 2))[1]
    assert (found & cells).sum() == 2 * cells.sum() and not found.all()


@both
def test_variance_ranks_tokens_by_what_they_hold(geometry):
    run = make_run((8, 12), geometry, selector="variance", dilation=0, draft_scale=2)
    drawn = torch.zeros_like(run.state.noise)
    _, edited = centre(run.state.grid)
    drawn[:, edited] = torch.linspace(-4, 4, CHANNELS)
    score, _ = select(run, *shrink(drawn, run.state.grid, 2))
    assert edited[score.flatten(1).argmax(1)].all()


@both
def test_without_a_reference_the_draft_is_used_instead(geometry):
    grid = TokenGrid(8, 8, geometry)
    place = Placement(grid, TokenGrid(5, 8, geometry))
    reference, draft = normal(1, 40, CHANNELS), normal(1, 16, CHANNELS, seed=1)
    state = SimpleNamespace(grid=grid, covered=place.covered, aligned=place.place(reference))
    shown = beside(draft, state, 2)
    small = mean_pixels(state.aligned, grid)
    assert torch.equal(shown[:, 12:], draft[:, 12:])  # the last row of cells
    torch.testing.assert_close(shown[:, :8], small[:, :8])
    image = F.pixel_shuffle(shown.transpose(1, 2).unflatten(2, (4, 4)), geometry.patch)
    half = F.pixel_shuffle(draft.transpose(1, 2).unflatten(2, (4, 4)), geometry.patch)
    known = F.pixel_shuffle(small.transpose(1, 2).unflatten(2, (4, 4)), geometry.patch)
    if geometry == PACKED:  # the third row of cells has one row of pixels of either
        assert torch.equal(image[:, :, 5], half[:, :, 5])
        torch.testing.assert_close(image[:, :, 4], known[:, :, 4])
    else:  # its only row of pixels is half reference, half draft
        torch.testing.assert_close(image[:, :, 2], (known[:, :, 2] + half[:, :, 2]) / 2)


@both
def test_a_grid_of_another_geometry_than_the_adapters_is_refused(geometry):
    other = UNPACKED if geometry == PACKED else PACKED
    run = make_run((4, 4), geometry)
    with pytest.raises(ValueError, match=f"grid: expected the token geometry of oracle, patch={other.patch}, got"):
        Run(Oracle(run.adapter.target, other), PIPE, run.config, run.state)


def test_an_unpacked_layout_counts_as_many_tokens_as_a_packed_one():
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 1:3] = True
    packed, unpacked = (MixedLayout(TokenGrid(8, 10, geometry), mask) for geometry in (PACKED, UNPACKED))
    assert packed.tokens == unpacked.tokens and torch.equal(packed.positions, unpacked.positions)
