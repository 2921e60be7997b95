"""Sequences of unequal length into batches: by a budget of tokens."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distrl.data.errors import DataError
from distrl.data.order import permutation

PASS_TOKENS = 64
"""A pass forward and back costs about as much as so many tokens more, whatever it reads (measured
on a CPU with 2 M parameters)."""


def token_budget_batches(
    lengths: Sequence[int], budget: int, *, seed: int, epoch: int = 0
) -> list[list[int]]:
    """Indices 0..len(lengths)-1 in batches of at most `budget` padded tokens.

    Every index is in one batch, and longest x count of a batch is within `budget`. Equals are
    put with equals to save padding; which of the equally long stand together, and the order
    of batches, follow (seed, epoch). Raises DataError where one sequence exceeds the budget.
    """
    order = permutation(len(lengths), seed, epoch)
    order = order[np.argsort(np.asarray(lengths, dtype=np.int64)[order], kind="stable")]
    batches: list[list[int]] = []
    for index in order.tolist():
        length = lengths[index]
        if length > budget:
            raise DataError(
                f"sequence {index} has {length} tokens, and a batch may have {budget}; raise the "
                "batch's tokens or shorten sequences"
            )
        # In rising order the newest is the longest, so it decides the width of the batch.
        if batches and length * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return [batches[i] for i in permutation(len(batches), seed, epoch)]


def balanced(lengths: Sequence[int], workers: int) -> list[list[int]]:
    """Which of so many sequences each worker takes, so that tokens are shared out evenly: the
    longest that is left goes to whoever has least."""
    if workers == 1:
        return [list(range(len(lengths)))]
    loads = [(0, worker) for worker in range(workers)]
    shares: list[list[int]] = [[] for _ in range(workers)]
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        load, worker = heapq.heappop(loads)
        shares[worker].append(place)
        heapq.heappush(loads, (load + lengths[place], worker))
    return shares


def micro_batches(lengths: Sequence[int], budget: int, *, padded: bool = True) -> list[list[int]]:
    """Indices 0..len(lengths)-1, in the order of their lengths, in parts of at most `budget`
    tokens, pads included where there will be any; a sequence beyond it goes alone.

    Padded, it is the cheapest of all such cuts, where a part costs its tokens and PASS_TOKENS;
    without pads the parts are few and even.
    """
    lengths_N = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(lengths_N, kind="stable")
    ends = (_cheapest_cuts if padded else _fewest_cuts)(lengths_N[order], budget)
    return [order[first:end].tolist() for first, end in itertools.pairwise([0, *ends])]


def _fewest_cuts(lengths: np.ndarray, budget: int) -> list[int]:
    """Where each part ends if none is padded: few, and of about as many tokens."""
    total = int(lengths.sum())
    share = total / max(1, -(-total // budget))
    ends: list[int] = []
    tokens = 0
    for place, length in enumerate(lengths.tolist()):
        if tokens and tokens + length > budget:
            ends.append(place)
            tokens = 0
        tokens += length
        if tokens >= share and place + 1 < len(lengths):
            ends.append(place + 1)
            tokens = 0
    return [*ends, len(lengths)] if len(lengths) else ends


def _cheapest_cuts(lengths: np.ndarray, budget: int) -> list[int]:
    """Where each part ends; `lengths` rise. The cost of the first n sequences is the least over all
    last parts of the cost of those before it and its own."""
    costs = np.zeros(len(lengths) + 1)
    begins = np.zeros(len(lengths) + 1, dtype=np.int64)
    for end, width in enumerate(lengths.tolist(), start=1):
        first = min(end - 1, max(0, end - budget // width))
        padded = width * np.arange(end - first, 0, -1)
        candidates = costs[first:end] + padded
        best = int(candidates.argmin())
        costs[end], begins[end] = candidates[best] + PASS_TOKENS, first + best
    ends = [len(lengths)] if len(lengths) else []
    while ends and begins[ends[-1]]:
        ends.append(int(begins[ends[-1]]))
    return ends[::-1]


def pad_right(
    sequences: Sequence[ArrayLike], pad: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(ids_BT, lengths_B) int64: B sequences of ids, filled up with `pad` on the right.

    Masks are to be made of the lengths, never of the ids: `pad` may also be a real token.
    """
    arrays = [np.asarray(sequence) for sequence in sequences]
    lengths_B = np.array([len(array) for array in arrays], dtype=np.int64)
    ids_BT = np.full((len(arrays), max(lengths_B, default=0)), pad, dtype=np.int64)
    for row, array in zip(ids_BT, arrays, strict=True):
        row[: len(array)] = array
    return ids_BT, lengths_B
