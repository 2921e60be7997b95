"""The engine's pace against a loop that decodes token by token."""

from __future__ import annotations

import asyncio
import random

import pytest

from distrl.records import VersionSpan
from distrl.sim import run_virtual
from distrl.sim.engine import Engine, Pace

A, B = 0.01, 0.002


def engine(max_seqs=1000):
    return Engine(Pace(iteration_s=A, sequence_s=B, max_seqs=max_seqs))


def test_a_lone_sequence_takes_its_tokens_times_an_iteration():
    async def main():
        alone = engine()
        alone.switch(0)
        decoding = alone.add([50])
        await decoding.over
        assert asyncio.get_running_loop().time() == pytest.approx(50 * (A + B))
        assert alone.busy_s == pytest.approx(50 * (A + B))
        assert alone.spans(decoding) == ((VersionSpan(version=0, start=0, end=50),),)

    run_virtual(main())


def test_sequences_slow_each_other_and_leave_when_they_end():
    """Two run for 10 iterations, then the longer one for 10 more by itself."""

    async def main():
        shared = engine()
        decoding = shared.add([10, 20])
        await decoding.over
        expected = 10 * (A + 2 * B) + 10 * (A + B)
        assert asyncio.get_running_loop().time() == pytest.approx(expected)

    run_virtual(main())


def test_those_beyond_the_limit_wait_their_turn():
    async def main():
        narrow = engine(max_seqs=1)
        first, second = narrow.add([10]), narrow.add([5])
        await first.over
        assert not second.over.done()
        await second.over
        assert asyncio.get_running_loop().time() == pytest.approx(15 * (A + B))

    run_virtual(main())


def test_an_aborted_request_no_longer_slows_the_others():
    async def main():
        shared = engine()
        mine, other = shared.add([20]), shared.add([20])
        await asyncio.sleep(10 * (A + 2 * B))
        shared.abort(other)
        await mine.over
        expected = 10 * (A + 2 * B) + 10 * (A + B)
        assert asyncio.get_running_loop().time() == pytest.approx(expected)

    run_virtual(main())


def test_frozen_it_stands_still_and_the_switch_marks_the_tokens():
    async def main():
        held = engine()
        held.switch(3)
        decoding = held.add([10, 4])
        await asyncio.sleep(4 * (A + 2 * B) + 2 * (A + B) + 1e-6)
        held.freeze(1.0)
        await asyncio.sleep(1.0)
        held.switch(4)
        await decoding.over
        expected = 1.0 + 4 * (A + 2 * B) + 6 * (A + B)
        assert asyncio.get_running_loop().time() == pytest.approx(expected)
        assert held.spans(decoding) == (
            (VersionSpan(version=3, start=0, end=6), VersionSpan(version=4, start=6, end=10)),
            (VersionSpan(version=3, start=0, end=4),),
        )

    run_virtual(main())


@pytest.mark.parametrize("seed", range(5))
def test_it_agrees_with_a_loop_over_iterations(seed):
    """Arrivals at random times: each ends when a step-by-step engine would end it.

    The loop lets a request in at the next whole iteration, the engine at once, so an end may
    differ by an iteration and what it adds to the others.
    """
    rng = random.Random(seed)
    arrivals = sorted((rng.uniform(0, 3), rng.randint(1, 60)) for _ in range(40))

    async def main():
        shared, ends = engine(max_seqs=8), {}
        loop = asyncio.get_running_loop()

        async def request(number, at, length):
            await asyncio.sleep(at)
            await shared.add([length]).over
            ends[number] = loop.time()

        jobs = [request(n, at, length) for n, (at, length) in enumerate(arrivals)]
        await asyncio.gather(*jobs)
        return ends

    ends = run_virtual(main())
    by_loop = step_by_step(arrivals, max_seqs=8)
    for number in ends:
        assert ends[number] == pytest.approx(by_loop[number], abs=40 * (A + 8 * B) * 0.2)


def step_by_step(arrivals, max_seqs):
    now, running, waiting, ends = 0.0, {}, list(enumerate(arrivals)), {}
    while waiting or running:
        while waiting and waiting[0][1][0] <= now and len(running) < max_seqs:
            number, (_, length) = waiting.pop(0)
            running[number] = length
        if not running:
            now = waiting[0][1][0]
            continue
        now += A + B * len(running)
        for number in list(running):
            running[number] -= 1
            if not running[number]:
                del running[number]
                ends[number] = now
    return ends
