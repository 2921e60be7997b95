"""Batches by token budget, and padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrl.data.batching import pad_right, token_budget_batches
from distrl.data.errors import DataError


@given(st.lists(st.integers(0, 50)), st.integers(50, 300), st.integers(0, 2**63))
def test_every_index_once_and_within_budget(lengths: list[int], budget: int, seed: int) -> None:
    batches = token_budget_batches(lengths, budget, seed=seed)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batches)
    assert all(max(lengths[i] for i in b) * len(b) <= budget for b in batches)
    assert batches == token_budget_batches(lengths, budget, seed=seed)


def test_seed_and_epoch_change_batches_and_their_order() -> None:
    lengths = [5] * 40
    plans = [
        token_budget_batches(lengths, 20, seed=seed, epoch=epoch)
        for seed, epoch in ((0, 0), (1, 0), (0, 1))
    ]
    assert len({str(plan) for plan in plans}) == 3
    assert len({str(sorted(map(sorted, plan))) for plan in plans}) == 3


def test_lengths_are_grouped_and_batches_shuffled() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 90, size=2000).tolist()
    batches = token_budget_batches(lengths, 2048, seed=0)
    padded = sum(max(lengths[i] for i in b) * len(b) for b in batches)
    assert sum(lengths) / padded > 0.97
    longest = [max(lengths[i] for i in b) for b in batches]
    assert longest != sorted(longest)


def test_too_long_a_sequence_is_named() -> None:
    with pytest.raises(DataError, match="sequence 1 has 11 tokens, and a batch may have 10"):
        token_budget_batches([3, 11], 10, seed=0)


def test_pad_right() -> None:
    ids_BT, lengths_B = pad_right([np.array([1, 9], dtype=np.int32), [], [4, 5, 6]], pad=9)
    assert ids_BT.tolist() == [[1, 9, 9], [9, 9, 9], [4, 5, 6]]
    assert lengths_B.tolist() == [2, 0, 3]
    assert ids_BT.dtype == lengths_B.dtype == np.int64


def test_pad_nothing() -> None:
    ids_BT, lengths_B = pad_right([], pad=0)
    assert ids_BT.shape == (0, 0)
    assert lengths_B.shape == (0,)
