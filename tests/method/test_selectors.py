from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from specedit import SpecEditConfig
from specedit.layout import TokenGrid
from specedit.method import draft as drafts
from specedit.method.adapter import Run
from specedit.method.masks import cells_of_mask
from specedit.method.selectors import dilate, select, to_cells, top_cells, uniform_cells
from specedit.method.selectors.semantic import discrepancy
from specedit.models.flux import FluxKontext
from specedit.placement import Placement


def test_discrepancy_is_a_squared_distance_of_directions():
    a = torch.zeros(4, 3, 2, 2)
    a[:, 0] = 5.0
    b = torch.zeros(4, 3, 2, 2)
    b[0, 0], b[1, 1], b[2, 0] = 2.0, 1.0, -0.1  # same, orthogonal, opposite; the last is nothing at all
    score = discrepancy([a], [b], (4, 4))
    assert score.shape == (4, 4, 4)
    torch.testing.assert_close(score[:, 0, 0], torch.tensor([0.0, 2.0, 4.0, 1.0]))


def test_discrepancy_is_the_mean_over_layers_of_any_size():
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(2, c, s, s, generator=generator) for c, s in ((3, 4), (5, 8))]
    second = [torch.randn(2, c, s, s, generator=generator) for c, s in ((3, 4), (5, 8))]
    score = discrepancy(first, second, (8, 8))
    apart = [discrepancy([a], [b], (8, 8)) for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(score, (apart[0] + apart[1]) / 2)
    assert score.min() >= 0 and score.max() <= 4
    assert discrepancy(first, [2 * f for f in first], (8, 8)).abs().max() < 1e-6  # length does not matter


def test_a_cell_has_the_largest_score_of_its_tokens():
    score = torch.arange(15.0).view(1, 3, 5)
    assert to_cells(score).tolist() == [[[6, 8, 9], [11, 13, 14]]]


@pytest.mark.parametrize("by", [0, 1, 2])
def test_dilate(by):
    cells = torch.zeros(1, 7, 7, dtype=torch.bool)
    cells[0, 3, 1] = True
    expected = torch.zeros_like(cells)
    expected[0, 3 - by : 4 + by, max(0, 1 - by) : 2 + by] = True
    assert torch.equal(dilate(cells, by), expected)


def test_top_cells_takes_a_share_of_every_sample():
    score = torch.rand(3, 8, 9, generator=torch.Generator().manual_seed(0))
    chosen = top_cells(score, 0.3)
    cells = to_cells(score)
    assert chosen.flatten(1).sum(1).tolist() == [6, 6, 6]  # of 20
    for i in range(3):
        assert cells[i][chosen[i]].min() >= cells[i][~chosen[i]].max()
    assert top_cells(score, 0.001).flatten(1).sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("stride", [0, 1, 2, 3, 9])
def test_uniform_cells(stride):
    cells = uniform_cells(TokenGrid(9, 13), stride)
    expected = [[bool(stride) and i % stride == 0 and j % stride == 0 for j in range(7)] for i in range(5)]
    assert cells.tolist() == expected


def state_of(grid, batch=1, prompts=1, pictures=1):
    placement = Placement(grid, grid)
    return SimpleNamespace(
        grid=grid, placement=placement, batch=batch, prompts=prompts, pictures=pictures, device=torch.device("cpu")
    )


@pytest.mark.parametrize("grid", [TokenGrid(8, 8), TokenGrid(9, 11)], ids=str)
@pytest.mark.parametrize("size", [(144, 176), (300, 50), (3, 2), (9, 11), (1, 1)])
def test_a_cell_is_edited_where_a_pixel_overlaps_it(grid, size):
    generator = np.random.default_rng(0)
    mask = np.zeros(size, dtype=bool)
    for _ in range(2):
        mask[generator.integers(size[0]), generator.integers(size[1])] = True

    def overlap(cell, tokens, pixel, pixels):
        # [2 cell, 2 cell + 2) of `tokens` against [pixel, pixel + 1) of `pixels`, in whole numbers
        return 2 * cell * pixels < (pixel + 1) * tokens and pixel * tokens < min(2 * cell + 2, tokens) * pixels

    cells = grid.coarse()
    expected = torch.zeros(cells.shape, dtype=torch.bool)
    for r, c in np.argwhere(mask).tolist():
        for i in range(cells.height):
            for j in range(cells.width):
                expected[i, j] |= overlap(i, grid.height, r, size[0]) and overlap(j, grid.width, c, size[1])
    assert torch.equal(cells_of_mask(mask, state_of(grid))[0], expected)


HALF = np.zeros((64, 64), dtype=np.uint8)
HALF[:, :32] = 200


@pytest.mark.parametrize(
    "mask",
    [
        HALF,
        HALF[:, ::-1][:, ::-1],
        HALF.astype(np.float64) / 255,
        HALF > 0,
        HALF[None],
        HALF[None, None],
        Image.fromarray(HALF),
        Image.fromarray(HALF).convert("1"),
        Image.fromarray(HALF).convert("RGB"),
        torch.from_numpy(HALF),
        torch.from_numpy(HALF).to(torch.bfloat16),
        torch.from_numpy(HALF).float(),
        [HALF],
        HALF[..., None],
        np.stack([HALF, 0 * HALF, 0 * HALF], -1),
        np.stack([HALF] * 4, -1),
        np.stack([HALF | 1] * 3 + [HALF], -1),  # transparent on the right
        HALF.astype(">f4"),
        Image.fromarray(np.stack([HALF | 1, HALF], -1), "LA"),
    ],
    ids=lambda mask: f"{type(mask).__name__}-{getattr(mask, 'dtype', getattr(mask, 'mode', ''))}",
)
def test_kinds_of_mask(mask):
    cells = cells_of_mask(mask, state_of(TokenGrid(4, 4), batch=2))
    assert cells.tolist() == [[[True, False]] * 2] * 2


def test_masks_follow_the_order_of_pictures_and_prompts():
    left, right = HALF, HALF[:, ::-1]
    tiled = [[[True, False]] * 2, [[False, True]] * 2] * 2
    together = [tiled[0], tiled[0], tiled[1], tiled[1]]
    for masks in (np.stack([left, right]), [left, right], [Image.fromarray(left), torch.from_numpy(right.copy())]):
        for prompts, pictures, expected in ((1, 2, tiled), (2, 2, tiled), (2, 1, together)):
            state = state_of(TokenGrid(4, 4), 4, prompts, pictures)
            assert cells_of_mask(masks, state).tolist() == expected


def test_masks_three_pixels_wide_are_no_colours():
    masks = np.zeros((2, 8, 3))
    masks[0, :, 0] = masks[1, :, 2] = 1
    expected = [[[True, False]] * 2, [[False, True]] * 2]
    assert cells_of_mask(masks, state_of(TokenGrid(4, 4), batch=2)).tolist() == expected


NAN = np.full((8, 8), np.nan)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.zeros((8, 8)), ValueError, "expected some nonzero pixels, got an empty mask"),
        (np.stack([HALF, 0 * HALF]), ValueError, "expected some nonzero pixels"),
        (NAN, ValueError, "expected finite values, got NaN"),
        (NAN + np.inf, ValueError, "expected finite values"),
        (np.ones(8), ValueError, r"expected \(H, W\).*got \(8,\)"),
        (np.ones((1, 1, 1, 8, 8)), ValueError, r"expected \(H, W\).*got \(1, 1, 1, 8, 8\)"),
        (np.ones((2, 3, 8, 8)), ValueError, r"expected \(H, W\).*got \(2, 3, 8, 8\)"),
        (np.ones((0, 8)), ValueError, r"expected \(H, W\).*got \(0, 8\)"),
        (np.ones((3, 8, 8)), ValueError, "expected 1 mask or 2, one for each image, got 3"),
        (np.zeros((8, 8, 3)), ValueError, "expected some nonzero pixels, got an empty mask"),
        (np.array([["all"]]), TypeError, "expected an array of numbers or booleans, got dtype <U3"),
        (np.array([[None]]), TypeError, "expected an array of numbers or booleans, got dtype object"),
        ([], ValueError, "expected 1 mask or 2, one for each image, got 0"),
        ("mask.png", TypeError, "expected a PIL image, array or tensor, got str"),
        (7, TypeError, "expected a PIL image, array or tensor, got int"),
    ],
)
def test_wrong_masks(mask, error, message):
    with pytest.raises(error, match=f"edit_mask: {message}"):
        cells_of_mask(mask, state_of(TokenGrid(4, 4), batch=2))


@pytest.fixture
def drafted(pipe, picture):
    """A run of a configuration whose draft is the reference, changed in one corner; and that draft."""
    grid = TokenGrid(16, 16)
    adapter = FluxKontext()
    image = torch.from_numpy(np.array(picture(256, 256))).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe._encode_vae_image(image, None)
    aligned = pipe._pack_latents(latents, 1, 4, 32, 32)
    state = SimpleNamespace(
        grid=grid, batch=1, device=aligned.device, aligned=aligned, covered=None, draft_features=None
    )

    def make(scale, change, config):
        small, draft_grid = drafts.shrink(aligned, grid, scale)
        small = small.clone().view(1, *draft_grid.shape, -1)
        small[:, : draft_grid.height // 4, : draft_grid.width // 4] += change
        return Run(adapter, pipe, config, state), small.flatten(1, 2), draft_grid

    return make


@pytest.mark.parametrize("scale", [2, 4])
def test_an_unchanged_draft_edits_nothing(drafted, scale):
    config = SpecEditConfig(verify_at="draft", draft_scale=scale, threshold=0.001)
    with torch.no_grad():
        score, edited = select(*drafted(scale, 0.0, config))
    assert score.shape == (1, 16, 16) and edited.shape == (1, 8, 8)
    assert score.abs().max() < 1e-4 and not edited.any()


@pytest.mark.parametrize("verify_at", ["full", "draft"])
@pytest.mark.parametrize("scale", [2, 4])
def test_the_changed_corner_scores_highest(drafted, verify_at, scale):
    config = SpecEditConfig(verify_at=verify_at, draft_scale=scale)
    with torch.no_grad():
        plain, _ = select(*drafted(scale, 0.0, config))
        score, _ = select(*drafted(scale, torch.linspace(-3, 3, 16), config))
    assert plain.min() >= 0 and score.max() <= 4
    raised = (score - plain)[0]
    assert raised[:4, :4].mean() > 3 * raised[8:, 8:].abs().mean() and raised[:4, :4].mean() > 0.02


def test_threshold_and_dilation_are_applied_to_the_score(drafted):
    with torch.no_grad():
        score, edited = select(*drafted(4, 3.0, SpecEditConfig(threshold=1.0, dilation=0)))
        _, grown = select(*drafted(4, 3.0, SpecEditConfig(threshold=1.0, dilation=1)))
    assert torch.equal(edited, to_cells(score) > 1.0) and edited.any() and not edited.all()
    assert torch.equal(grown, dilate(edited, 1))


def test_variance_ranks_tokens_by_their_channels(drafted):
    with torch.no_grad():
        score, edited = select(*drafted(4, torch.linspace(-9, 9, 16), SpecEditConfig(selector="variance", dilation=0)))
    assert score.flatten().argmax() in [r * 16 + c for r in range(4) for c in range(4)]
    assert int(edited.sum()) == round(0.3 * 64)


def test_edges_are_those_of_the_decoded_draft(drafted):
    run, draft, draft_grid = drafted(4, 0.0, SpecEditConfig(selector="edges", dilation=0))
    half = np.zeros((1, 3, 256, 256), dtype=np.float32)
    half[..., 100:] = 1.0
    run.adapter.decode = lambda *_: torch.from_numpy(half)
    score, edited = select(run, draft, draft_grid)
    assert score[0].sum(0).nonzero().flatten().tolist() == [6]  # column 100 lies in the seventh token
    assert edited[0, :, 3].all() and int(edited.sum()) == round(0.3 * 64)


def test_uniform_detects_no_cells(drafted):
    score, edited = select(*drafted(4, 3.0, SpecEditConfig(selector="uniform")))
    assert score is None and not edited.any()
