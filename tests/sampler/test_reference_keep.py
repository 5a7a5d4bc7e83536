"""reference_keep: after a stage's first step, only the reference tokens that the target attends to stay."""

from collections import Counter

import pytest
import torch

import specedit
from specedit.layout import LayoutSet, MixedLayout, TokenGrid
from specedit.method import denoise
from specedit.method.reference_selection import ReferenceMass, beside_edited, kept_tokens, measured_rows, selected
from specedit.models.attention.contexts import Mixed, Packed
from specedit.models.attention.measuring import Measuring, received
from specedit.models.attention.sequences import pack
from specedit.part_layout import PartLayout
from specedit.placement import Placement
from tests.sampler.common import CENTRE, CORNER, assert_two_single_runs, close, count_calls

QUICK = dict(steps=(2, 3, 2), draft_steps=2, threshold=1.6, dilation=0)


def table(tokens):
    return torch.zeros(tokens, 4), torch.zeros(tokens, 4)


@pytest.mark.parametrize("restore", ["full", "reference"])
def test_later_steps_have_a_shorter_sequence(pipe, edit, restore):
    specedit.install(pipe, **QUICK, reference_keep=0.15, restore=restore)
    calls = count_calls(pipe)
    first = edit(pipe, edit_mask=CORNER)
    mixed = 7 * 4 + 9  # four cells are edited, and of the others three are in the uniform set
    stages = {"full": [(16, 2), (mixed, 3), (64, 2)], "reference": [(16, 2), (mixed, 5)]}[restore]
    expected = Counter()
    for tokens, steps in stages:
        expected[2 * tokens] += 1
        expected[tokens + kept_tokens(0.15, tokens)] += steps - 1
    assert calls == expected
    assert torch.isfinite(first).all() and torch.equal(edit(pipe, edit_mask=CORNER), first)
    report = specedit.report(pipe)
    specedit.install(pipe, **QUICK, restore=restore)
    whole = edit(pipe, edit_mask=CORNER)
    assert specedit.report(pipe).flops > report.flops and (whole - first).abs().max() > 1e-3
    assert [s.tokens for s in specedit.report(pipe).stages] == [s.tokens for s in report.stages]


@pytest.mark.parametrize(
    "changes", [{}, {"restore": "reference"}, {"draft_steps": 0}, {"locked": "reference"}], ids=str
)
def test_keeping_all_is_keeping_the_reference(pipe, edit, changes):
    runs = []
    for keep in (None, 1.0):
        specedit.install(pipe, **QUICK | changes, reference_keep=keep)
        runs.append(edit(pipe))
    assert torch.equal(*runs)


@pytest.mark.parametrize("changes", [{"locked": "reference"}, {"forecast": "reuse"}, {"restore": "pixels"}], ids=str)
def test_it_goes_with_other_switches(pipe, edit, changes):
    specedit.install(pipe, **QUICK | dict(steps=(4, 4, 2)) | changes, reference_keep=0.2)
    first = edit(pipe, edit_mask=CORNER)
    assert torch.isfinite(first).all() and torch.equal(edit(pipe, edit_mask=CORNER), first)


def test_a_stage_of_one_step_measures_nothing(pipe, edit):
    specedit.install(pipe, **QUICK | dict(steps=(1, 1, 1)), reference_keep=0.2)
    shortened = edit(pipe, edit_mask=CORNER), specedit.report(pipe).flops
    specedit.install(pipe, **QUICK | dict(steps=(1, 1, 1)))
    close(shortened[0], edit(pipe, edit_mask=CORNER))
    assert specedit.report(pipe).flops == shortened[1]


@pytest.mark.slow
def test_a_batch_of_two_masks_is_two_single_runs(pipe, edit, picture):
    specedit.install(pipe, **QUICK, restore="reference", reference_keep=0.2)
    for masks in ([CORNER, CENTRE], [CORNER, CORNER]):
        assert_two_single_runs(pipe, edit, picture, masks)


def test_what_is_kept_is_what_was_attended_to(pipe, edit, monkeypatch):
    """A reference token that nobody looks at is the first to go: its keys are far from every query."""
    seen, shorten = [], denoise.shorten_reference

    def keep(group):
        mass = group.mass
        shorten(group)
        seen.append((mass, group))

    monkeypatch.setattr(denoise, "shorten_reference", keep)
    specedit.install(pipe, **QUICK, reference_keep=0.25)
    edit(pipe, edit_mask=CORNER)
    assert len(seen) == 3  # coarse, mixed and full
    for mass, group in seen:
        kept = group.reference_layout.index
        assert len(kept) == mass.count == group.reference.shape[1] and (kept.diff() > 0).all()
        left = torch.ones(len(mass.total), dtype=torch.bool)
        left[kept] = False
        assert mass.first[kept].sum() == min(mass.first.sum(), mass.count)
        ranked = mass.total[kept[~mass.first[kept]]]
        assert not len(ranked) or ranked.min() >= mass.total[left & ~mass.first].max()
    assert seen[2][0].first.any()  # the ring around the edited corner


# ----------------------------------------------------------------------------------------------------- its parts


def by_hand(q, k, bias, rows, reference):
    """Attention that the last `reference` keys get from some queries, by the formula, in float64."""
    total = torch.zeros(reference, dtype=torch.float64)
    for head in range(q.shape[1]):
        for row in rows:
            logits = (k[:, head].double() @ q[row, head].double()) / q.shape[2] ** 0.5 + bias
            total += logits.softmax(0)[-reference:]
    return total


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("trimmed", [False, True])
def test_the_mass_of_a_sequence_by_hand(biased, trimmed):
    torch.manual_seed(0)
    text, target, reference = 3, 8, 5
    n, rows = text + target + reference, torch.tensor([0, 3, 6])
    q, k = torch.randn(2, 1, n, 2, 8)
    bias = torch.rand(n) if biased else None
    mass = ReferenceMass(rows, torch.zeros(reference, dtype=torch.bool), 2)
    whole = Mixed(rotary=table(n), index=torch.arange(n), key_bias=bias, backend="torch")
    context = Measuring(whole=whole, mass=mass, texts=(text,), target=target, reference=reference)
    queries = q[:, text : text + target] if trimmed else q
    context.measure(type("Scale", (), {"q": queries, "k": k}), trimmed)
    expected = by_hand(q[0], k[0], 0 if bias is None else bias.double(), (text + rows).tolist(), reference)
    close(mass.total.double(), expected)


@pytest.mark.parametrize("trimmed", [False, True])
def test_the_mass_of_packed_sequences_is_their_sum(trimmed):
    torch.manual_seed(0)
    texts, target, reference = [3, 6], 4, 5
    packing = pack(texts, target, reference, torch.device("cpu"))
    n, rows = sum(texts) + 2 * (target + reference), torch.tensor([1, 3])
    q, k = torch.randn(2, 1, n, 2, 8)
    mass = ReferenceMass(rows, torch.zeros(reference, dtype=torch.bool), 2)
    whole = Packed(rotary=table(n), packing=packing, backend="torch")
    context = Measuring(whole=whole, mass=mass, texts=tuple(texts), target=target, reference=reference)
    starts = [0, 3 + 9]
    targets = torch.cat([torch.arange(s + t, s + t + target) for s, t in zip(starts, texts, strict=True)])
    context.measure(type("Scale", (), {"q": q[:, targets] if trimmed else q, "k": k}), trimmed)
    expected = torch.zeros(reference, dtype=torch.float64)
    for start, text in zip(starts, texts, strict=True):
        part = slice(start, start + text + target + reference)
        expected += by_hand(q[0, part], k[0, part], 0, (text + rows).tolist(), reference)
    close(mass.total.double(), expected)


def test_all_attention_is_received_somewhere():
    q, k = torch.randn(7, 3, 8), torch.randn(11, 3, 8)
    assert received(q, k, None).sum().item() == pytest.approx(7 * 3, rel=1e-5)


def test_tokens_beside_the_edit_come_first_and_the_rest_by_mass():
    first = torch.tensor([False, True, False, False, False, True])
    mass = ReferenceMass(torch.arange(2), first, 3)
    mass.add(torch.tensor([0.5, 0.1, 3.0, 1.0, 0.2, 0.0]))
    mass.add(torch.tensor([3.0, 0.0, 0.0, 1.0, 0.2, 0.0]))
    assert mass.kept().tolist() == [0, 1, 5]
    mass.total = torch.full((6,), torch.nan)  # an overflow: what is kept is arbitrary, but there is something
    assert len(mass.kept()) == 3


def test_how_many_are_kept_and_measured():
    assert [kept_tokens(0.15, n) for n in (1, 6, 7, 100)] == [1, 1, 2, 15]
    assert [measured_rows(n) for n in (1, 64, 4096)] == [1, 64, 64]


def test_a_selection_of_several_references():
    grid = TokenGrid(4, 4)
    layouts = MixedLayout.all_fine(grid), MixedLayout.all_coarse(grid)
    both = selected(LayoutSet(layouts), torch.tensor([1, 15, 16, 18]))
    assert [one.tokens for one in both.layouts] == [2, 2] and both.tokens == 4
    assert torch.equal(both.layouts[1].positions, layouts[1].positions[[0, 2]])
    none = selected(LayoutSet(layouts), torch.tensor([17]))
    assert [one.tokens for one in none.layouts] == [0, 1] and isinstance(none.layouts[0], PartLayout)


@pytest.mark.parametrize("offset", [(0, 0), (1, 1), (-2, 0)])
def test_the_ring_around_an_edit_where_the_reference_lies(offset):
    """Tokens whose positions lie in cells that touch the edited one, whatever the reference's place and layout."""
    output, reference = TokenGrid(8, 8), TokenGrid(6, 6)
    placement = Placement(output, reference, *offset)
    edited = torch.zeros(1, 4, 4, dtype=torch.bool)
    edited[0, 1, 1] = True
    state = type("State", (), {"edited": 0, "placement": placement})
    for target in (MixedLayout.all_fine(output), MixedLayout(output, edited[0]), MixedLayout.all_coarse(output)):
        layout = placement.layout(target)
        ring = beside_edited(state, edited, layout)
        at = layout.positions * (2 if layout.unit == 2 else 1)
        cells = (at // 2).long()
        expected = ((cells - 1).abs().amax(1) == 1) & (cells >= 0).all(1) & (cells < 4).all(1)
        assert torch.equal(ring, expected), (target, offset)
