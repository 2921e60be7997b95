"""Slots: counted, waited for, freed."""

from __future__ import annotations

import asyncio

import pytest

from distrl.config import DriverConfig
from distrl.driver import DriverError
from distrl.driver.admission import Admission
from distrl.sim import Deadlock, run_virtual


def admission(staleness=1, batch=3, wanted=100, room=lambda in_flight: True):
    return Admission(slots=(staleness + 1) * batch, wanted=wanted, room=room)


@pytest.mark.parametrize(
    ("settings", "slots"),
    [
        ({"max_staleness": 0}, 4),
        ({"max_staleness": 1}, 8),
        ({"max_staleness": 2, "window": 3}, 12 - 3),
        ({"max_staleness": 1, "lead": 3}, 16),
        ({"max_staleness": "auto", "staleness_ceiling": 3}, 16),
    ],
)
def test_there_are_as_many_slots_as_the_proof_says(settings, slots):
    """(l + 1) B - W, with batches of 4; of them as many as a bound that is moved asks for."""
    config = DriverConfig(prompts_per_step=4, **settings)
    assert config.slots == slots and config.lockstep == (slots == 4)
    if config.max_staleness == "auto":
        assert [config.slots_at(bound) for bound in range(4)] == [4, 8, 12, 16]
    else:
        assert config.slots_at(config.max_staleness) == slots


@pytest.mark.parametrize(("staleness", "slots"), [(0, 3), (1, 6), (4, 15)])
def test_all_free_slots_are_taken_at_once(staleness, slots):
    async def main():
        counter = admission(staleness)
        assert await counter.admit() == slots == counter.taken == counter.in_flight
        await counter.admit()

    with pytest.raises(Deadlock):
        run_virtual(main())


def test_a_landing_keeps_its_slot_a_drop_and_a_release_free_theirs():
    async def main():
        counter = admission()
        await counter.admit()
        waiting = asyncio.ensure_future(counter.admit())
        for _ in range(3):
            counter.landed()
        await asyncio.sleep(1)
        assert not waiting.done() and (counter.taken, counter.in_flight) == (6, 3)
        counter.dropped()
        assert await waiting == 1
        counter.released(3)
        assert await counter.admit() == 3
        assert (counter.taken, counter.in_flight) == (6, 6)

    run_virtual(main())


def test_more_slots_let_the_waiting_go_on_and_fewer_are_waited_for():
    async def main():
        counter = admission()
        await counter.admit()
        waiting = asyncio.ensure_future(counter.admit())
        await asyncio.sleep(1)
        counter.resize(9)
        assert await waiting == 3
        counter.resize(6)
        waiting = asyncio.ensure_future(counter.admit())
        for _ in range(4):
            await asyncio.sleep(1)
            assert not waiting.done()
            counter.dropped()
        assert await waiting == 1 and counter.taken == 6

    run_virtual(main())


def test_only_what_is_wanted_is_admitted_and_a_drop_is_replaced():
    async def main():
        counter = admission(wanted=4)
        assert await counter.admit() == 4
        counter.dropped()
        assert await counter.admit() == 1
        assert counter.wanted == 0

    run_virtual(main())


def test_room_in_the_buffer_is_asked_for_each():
    async def main():
        counter = admission(room=lambda in_flight: in_flight < 2)
        assert await counter.admit() == 2
        counter.landed()
        assert await counter.admit() == 1

    run_virtual(main())


def test_nothing_is_admitted_once_closed():
    async def main():
        counter = admission()
        counter.close()
        await counter.admit()

    with pytest.raises(Deadlock):
        run_virtual(main())


def test_slots_that_nobody_held_are_an_error():
    async def main():
        counter = admission()
        await counter.admit()
        with pytest.raises(DriverError, match="counted twice"):
            counter.released(1)

    run_virtual(main())
