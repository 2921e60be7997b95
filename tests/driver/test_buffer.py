"""Order, exactly once, and the byte bound."""

from __future__ import annotations

import asyncio
import random

import pytest

from distrl.driver import DriverError
from distrl.driver.buffer import BufferClosed, Landed, OrderedBuffer
from distrl.records import GroupInfo, Parcel, ScoredInfo, VersionSpan
from distrl.sim import run_virtual


def landed(index, nbytes=10, oldest=0, newest=0, version=0):
    spans = tuple(
        (
            VersionSpan(version=oldest, start=0, end=1),
            VersionSpan(version=newest, start=1, end=length),
        )
        for length in (3, 5)
    )
    group = GroupInfo(
        index=index,
        prompt_id=f"p{index}",
        generator="g",
        lengths=(3, 5),
        spans=spans,
        finish_reasons=("stop", "length"),
        nbytes=nbytes,
        seconds=1.0,
    )
    info = ScoredInfo(group=group, rewards=(0.0, 1.0), seconds=0.5)
    return Landed(
        parcel=Parcel(info=info, payload=index),
        bound=1,
        admitted_s=0.0,
        landed_s=1.0,
        landed_version=version,
    )


def buffer(first=0, batch=2, capacity=100, max_bytes=1000, window=0):
    return OrderedBuffer(
        first=first, batch=batch, capacity=capacity, max_bytes=max_bytes, window=window
    )


def test_whatever_the_order_of_arrival_the_order_of_issue_comes_out():
    async def main():
        for seed in range(20):
            held = buffer(first=7)
            order = random.Random(seed).sample(range(7, 37), 30)
            for index in order:
                if index % 5 == 0:
                    held.drop(index, "five")
                else:
                    held.put(landed(index))
            taken = [group.index for _ in range(12) for group in await held.take(2)]
            assert taken == [i for i in range(7, 37) if i % 5]
            assert (held.groups, held.nbytes, held.cursor) == (0, 0, 37)
            assert held.drops == {"five": 6}

    run_virtual(main())


def test_a_late_group_is_waited_for():
    async def main():
        held = buffer()
        for index in (1, 2, 3):
            held.put(landed(index))
        waiting = asyncio.ensure_future(held.take(2))
        await asyncio.sleep(1)
        assert not waiting.done() and held.cursor == 0
        held.put(landed(0))
        assert [group.index for group in await waiting] == [0, 1]
        assert held.cursor == 2

    run_virtual(main())


def test_the_cursor_passes_drops_only_in_order():
    async def main():
        held = buffer()
        held.drop(3, "late")
        held.put(landed(0))
        held.drop(1, "early")
        held.put(landed(2))
        assert held.cursor == 0 and held.drops == {}
        await held.take(2)
        assert held.cursor == 4 and held.drops == {"early": 1, "late": 1}

    run_virtual(main())


def test_what_is_swept_is_gone_for_good_and_counted_once():
    async def main():
        held = buffer()
        for index in (0, 1, 3):
            held.put(landed(index))
        swept = held.sweep(lambda group: group.index in (1, 3), "too old")
        assert [group.index for group in swept] == [1, 3]
        assert (held.groups, held.nbytes, held.cursor) == (1, 10, 0)
        assert held.ahead == {1, 3} and held.drops == {"too old": 2}
        held.put(landed(2))
        assert [group.index for group in await held.take(2)] == [0, 2]
        assert held.cursor == 4 and held.ahead == set() and held.drops == {"too old": 2}

    run_virtual(main())


def test_one_that_is_late_is_overtaken_within_the_window_and_no_further():
    async def main():
        held = buffer(window=2)
        held.put(landed(1))
        held.put(landed(3))
        waiting = asyncio.ensure_future(held.take(2))
        await asyncio.sleep(1)
        assert not waiting.done(), "3 is beyond the window"
        held.put(landed(2))
        assert [group.index for group in await waiting] == [1, 2]
        assert held.cursor == 0 and held.ahead == {1, 2}
        held.put(landed(0))
        assert [group.index for group in await held.take(2)] == [0, 3]
        assert held.cursor == 4 and held.ahead == set()

    run_virtual(main())


def test_an_index_settles_once():
    held = buffer(first=4)
    held.put(landed(5))
    held.drop(6, "no")
    for index in (3, 5, 6):
        with pytest.raises(DriverError, match=f"group {index} .*twice"):
            held.put(landed(index))
        with pytest.raises(DriverError, match="twice"):
            held.drop(index, "no")


def test_more_groups_than_slots_are_an_error():
    held = buffer(capacity=1)
    held.put(landed(0))
    with pytest.raises(DriverError, match="full"):
        held.put(landed(1))


def test_close_lets_the_waiting_taker_go_but_a_full_batch_is_still_given():
    async def main():
        held = buffer()
        waiting = asyncio.ensure_future(held.take(2))
        await asyncio.sleep(1)
        held.close()
        with pytest.raises(BufferClosed):
            await waiting
        held.put(landed(0))
        held.put(landed(1))
        assert len(await held.take(2)) == 2

    run_virtual(main())


def test_room_reckons_what_is_in_flight_as_large_as_the_largest_seen():
    held = buffer(batch=2, max_bytes=100)
    assert held.room(0) and held.room(1)
    assert not held.room(2), "nobody knows yet how large a group is"
    held.put(landed(0, nbytes=20))
    held.put(landed(1, nbytes=5))
    assert held.room(2)  # 25 + 3 x 20
    assert not held.room(3)  # 25 + 4 x 20 = 105


def test_the_next_batch_always_has_room():
    held = buffer(batch=3, max_bytes=1)
    held.put(landed(0, nbytes=1000))
    assert held.room(0) and held.room(1)
    assert not held.room(2)
