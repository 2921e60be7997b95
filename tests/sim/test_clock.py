"""Virtual time: jumps, order, and every way to be stuck."""

from __future__ import annotations

import asyncio
import time

import pytest

from distrl.sim import Deadlock, LeftoverTasks, Livelock, OutOfTime, clock, run_virtual


def test_a_day_takes_no_time():
    async def main():
        await asyncio.sleep(86_400 * 3)
        return asyncio.get_running_loop().time()

    began = time.monotonic()
    assert run_virtual(main()) == 86_400 * 3
    assert time.monotonic() - began < 1


def test_timers_fire_in_order_of_time_and_then_of_call():
    seen = []

    async def at(seconds, name):
        await asyncio.sleep(seconds)
        seen.append((asyncio.get_running_loop().time(), name))

    async def main():
        await asyncio.gather(at(2, "c"), at(0.1, "a"), at(2, "d"), at(0.3, "b"))

    run_virtual(main())
    assert seen == [(0.1, "a"), (0.3, "b"), (2, "c"), (2, "d")]


def test_waiting_for_nothing_is_a_deadlock_that_names_who_waits():
    async def waits_for_ever():
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="waits_for_ever"):
        run_virtual(waits_for_ever())


def test_turning_without_time_is_a_livelock(monkeypatch):
    monkeypatch.setattr(clock, "_TURNS", 1000)

    async def spin():
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Livelock):
        run_virtual(spin())


def test_the_limit_is_virtual():
    with pytest.raises(OutOfTime, match="10 virtual seconds"):
        run_virtual(asyncio.sleep(11), limit_s=10)
    run_virtual(asyncio.sleep(9), limit_s=10)


def test_a_task_left_behind_is_an_error():
    kept = []

    async def main():
        kept.append(asyncio.ensure_future(asyncio.sleep(5)))

    with pytest.raises(LeftoverTasks, match="sleep"):
        run_virtual(main())


def test_threads_run_at_once_and_their_errors_arrive():
    async def main():
        assert await asyncio.to_thread(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(divmod, 7, 0)

    run_virtual(main())


def test_errors_of_the_coroutine_pass_through():
    async def main():
        raise KeyError("x")

    with pytest.raises(KeyError):
        run_virtual(main())
