"""The prompt stream: each row once an epoch, and exact resume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrl.data.errors import DataError
from distrl.data.order import permutation
from distrl.data.sources import PromptRow
from distrl.data.stream import PromptStream


def rows(count: int) -> list[PromptRow]:
    return [
        PromptRow(
            prompt_id=f"p{i}", text=str(i), token_ids=np.array([i], dtype=np.int32), meta={"i": i}
        )
        for i in range(count)
    ]


def ids(stream: PromptStream, count: int) -> list[str]:
    return [stream.next().prompt_id for _ in range(count)]


def test_each_row_once_an_epoch_in_a_new_order() -> None:
    stream = PromptStream(rows(50), seed=0)
    epochs = [ids(stream, 50) for _ in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 50 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_prompt_has_its_place_and_its_row() -> None:
    stream = PromptStream(rows(3), seed=7)
    prompts = [stream.next() for _ in range(8)]
    assert [p.index for p in prompts] == list(range(8))
    assert [p.epoch for p in prompts] == [0, 0, 0, 1, 1, 1, 2, 2]
    for p in prompts:
        assert p.prompt_id == f"p{p.text}" == f"p{p.meta['i']}" == f"p{p.token_ids[0]}"
    assert stream.cursor == 8


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**63))
def test_seek_goes_on_as_if_never_stopped(count: int, to: int, before: int, seed: int) -> None:
    straight, jumped = (PromptStream(rows(count), seed=seed) for _ in range(2))
    ids(straight, to)
    ids(jumped, before)
    jumped.seek(to)
    for _ in range(2 * count + 1):
        a, b = straight.next(), jumped.next()
        assert (a.index, a.epoch, a.prompt_id) == (b.index, b.epoch, b.prompt_id)


def test_seek_far_is_immediate() -> None:
    stream = PromptStream(rows(1000), seed=0)
    stream.seek(10**15)
    assert stream.next().epoch == 10**12


def test_order_is_the_same_for_good() -> None:
    """Runs are resumed on other machines and with other versions of numpy."""
    assert permutation(8, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(8, 1, 5).tolist() == [3, 5, 6, 1, 2, 7, 0, 4]


def test_no_rows_and_no_negative_cursor() -> None:
    with pytest.raises(DataError, match="at least one prompt"):
        PromptStream([], seed=0)
    with pytest.raises(ValueError, match="got -1"):
        PromptStream(rows(2), seed=0).seek(-1)
