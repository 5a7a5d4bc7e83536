"""ToCa: which tokens are computed again, and what becomes of them."""

import pytest
import torch

from specedit.forecast.toca import ToCaForecaster, fresh_tokens

TEXT, TARGET, REFERENCE = 3, 20, 5


def store_values(forecaster, lengths):
    """Puts a last block in the store whose value vectors have these lengths on the target tokens."""
    values = torch.full((len(lengths), TEXT + TARGET + REFERENCE, 2, 4), 100.0)
    values[:, TEXT : TEXT + TARGET] = (lengths / 8**0.5)[:, :, None, None]
    forecaster.store.entries[1] = (values * 0, values * 7)
    forecaster.store.entries[2] = (values, values)
    forecaster.store.text_tokens = TEXT


@pytest.mark.parametrize(("tokens", "fresh"), [(1, 1), (10, 1), (11, 2), (4096, 410)])
def test_a_tenth_of_the_tokens(tokens, fresh):
    assert fresh_tokens(tokens) == fresh


def test_short_values_first_for_every_sample():
    forecaster = ToCaForecaster(4)
    forecaster.observe(0, torch.zeros(2, TARGET, 3))
    lengths = torch.arange(1.0, TARGET + 1).expand(2, -1).clone()
    lengths[1] = lengths[1].flip(0)
    store_values(forecaster, lengths)
    assert forecaster.select(1).tolist() == [[0, 1], [TARGET - 2, TARGET - 1]]


def test_stale_tokens_get_their_turn():
    forecaster = ToCaForecaster(4)
    forecaster.observe(0, torch.zeros(1, TARGET, 3))
    store_values(forecaster, torch.ones(1, TARGET))
    chosen = []
    for step in (1, 2, 3):
        index = forecaster.select(step)
        forecaster.merge(step, index, torch.ones(1, index.shape[1], 3))
        chosen += index[0].tolist()
    assert len(set(chosen)) == len(chosen) == 6  # equally important: never the same token twice


def test_merge_replaces_these_tokens_alone():
    feature = torch.randn(2, TARGET, 3, generator=torch.Generator().manual_seed(0))
    forecaster = ToCaForecaster(4)
    forecaster.observe(0, feature)
    index = torch.tensor([[0, 7], [3, 19]])
    fresh = torch.full((2, 2, 3), 9.0)
    merged = forecaster.merge(1, index, fresh)
    expected = feature.clone()
    expected[0, [0, 7]] = expected[1, [3, 19]] = 9.0
    assert torch.equal(merged, expected) and torch.equal(forecaster.predict(2), expected)


def test_memory_counts_keys_and_values():
    forecaster = ToCaForecaster(4)
    forecaster.observe(0, torch.zeros(1, TARGET, 3))
    store_values(forecaster, torch.ones(1, TARGET))
    rows = TEXT + TARGET + REFERENCE
    assert forecaster.memory == 4 * (TARGET * 3 + 4 * rows * 2 * 4)
    forecaster.reset()
    assert forecaster.memory == 0
