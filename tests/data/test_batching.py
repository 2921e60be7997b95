"""Batches by token budget, and padding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrl.data.batching import (
    PASS_TOKENS,
    balanced,
    micro_batches,
    pad_right,
    token_budget_batches,
)
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
    assert all(len(batch) == 4 for plan in plans for batch in plan), "each is full"
    assert len({str(sorted(map(sorted, plan))) for plan in plans}) == 3
    alone = list(range(51, 61))  # a batch each, so that the order of batches is all there is
    orders = [
        token_budget_batches(alone, 60, seed=seed, epoch=epoch)
        for seed, epoch in ((0, 0), (1, 0), (0, 1))
    ]
    assert len({str(order) for order in orders}) == 3


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


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), budget=st.integers(50, 400))
def test_microbatches_take_each_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    parts = micro_batches(lengths, budget)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    longest = [max(lengths[row] for row in part) for part in parts]
    assert all(size * len(part) <= budget for size, part in zip(longest, parts, strict=True))
    assert longest == sorted(longest), "rows of like length go together"


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 5))
def test_sequences_are_shared_out_evenly(lengths: list[int], workers: int) -> None:
    shares = balanced(lengths, workers)
    assert sorted(row for share in shares for row in share) == list(range(len(lengths)))
    loads = [sum(lengths[row] for row in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_the_longest_that_is_left_goes_to_whoever_has_least() -> None:
    assert balanced([9, 1, 1, 1, 6], 2) == [[0], [4, 1, 2, 3]]


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9), budget=st.integers(1, 160))
def test_no_other_cut_into_parts_is_cheaper(lengths: list[int], budget: int) -> None:
    def cost(parts: list[list[int]]) -> int:
        return sum(PASS_TOKENS + max(part) * len(part) for part in parts)

    def fits(part: list[int]) -> bool:
        return len(part) == 1 or max(part) * len(part) <= budget

    rising = sorted(lengths)
    cheapest = min(
        cost(parts)
        for count in range(len(lengths))
        for cuts in itertools.combinations(range(1, len(lengths)), count)
        for parts in [[rising[a:b] for a, b in itertools.pairwise([0, *cuts, len(lengths)])]]
        if all(map(fits, parts))
    )
    found = micro_batches(lengths, budget)
    assert cost([[lengths[row] for row in part] for part in found]) == cheapest


def test_little_of_a_batch_of_mixed_lengths_is_padding() -> None:
    lengths = np.random.default_rng(0).integers(8, 512, 256).tolist()
    padded = sum(max(lengths[row] for row in p) * len(p) for p in micro_batches(lengths, 4096))
    assert sum(lengths) > 0.95 * padded


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), budget=st.integers(50, 400))
def test_without_pads_only_tokens_count(lengths: list[int], budget: int) -> None:
    parts = micro_batches(lengths, budget, padded=False)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    assert max(sum(lengths[row] for row in part) for part in parts) <= budget
    assert len(parts) <= 2 * -(-sum(lengths) // budget), "no more passes than twice the fewest"


def test_without_pads_passes_are_as_even_as_they_are_few() -> None:
    parts = micro_batches([10] * 100, 400, padded=False)
    assert [len(part) for part in parts] == [34, 34, 32]
    assert micro_batches([10] * 6, 40, padded=False) == [[0, 1, 2], [3, 4, 5]]
    assert micro_batches([10] * 4, 20, padded=False) == [[0, 1], [2, 3]], "each is full"


def test_a_row_longer_than_the_budget_goes_alone() -> None:
    assert micro_batches([9, 3, 30], 20) == [[1, 0], [2]]
    assert micro_batches([9, 3, 30], 20, padded=False) == [[1, 0], [2]]
    assert micro_batches([30, 30], 20) == micro_batches([30, 30], 20, padded=False) == [[0], [1]]


def test_nothing_is_in_no_part() -> None:
    assert micro_batches([], 20) == micro_batches([], 20, padded=False) == []
    assert balanced([], 2) == [[], []]
