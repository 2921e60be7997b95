"""Sequences of unequal length into rectangles: by a budget of padded tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from distrl.data.errors import DataError
from distrl.data.order import permutation


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
