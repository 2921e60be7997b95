"""Fleets by themselves: what a whole run shows only by luck."""

from __future__ import annotations

import asyncio
import random

import pytest

from distrl.driver.errors import FleetExhausted
from distrl.driver.fleet import Fleet, GroupLost
from distrl.driver.generators import Generators
from distrl.driver.worker import Shortlist, Worker
from distrl.roles import HeldUp, RoleError, WorkerDied
from distrl.sim import FakeGenerator, FakeLearner, Faults, fixed, run_virtual


class Nobody:
    """Does not care how the work goes."""

    def waits(self, why):
        pass

    def held_by(self, worker):
        pass

    def failed(self, name, error):
        pass


class Echo:
    """A role of one method."""

    def __init__(self, name):
        self.name = name
        self.restarts = 0

    async def restart(self):
        self.restarts += 1

    async def close(self):
        pass


def fleet(*roles, max_restarts=3, tries=3):
    spawned = []

    def spawn(work):
        spawned.append(asyncio.create_task(work))
        return spawned[-1]

    return Fleet("echo", roles, max_restarts=max_restarts, tries=tries, spawn=spawn)


def test_who_has_left_and_dies_gives_up_what_it_had_in_flight():
    """A frozen process would keep it for ever."""

    async def main():
        gone, other = Echo("gone"), Echo("other")
        some = fleet(gone, other)

        async def work(role):
            if role is gone:
                await asyncio.Event().wait()
            return role.name

        asking = asyncio.create_task(some.do(work, witness=Nobody(), first=some.workers[0]))
        await asyncio.sleep(1)
        some.leave("gone")
        some.condemn(some.workers[0], WorkerDied("neither loaded nor given up"))
        assert await asyncio.wait_for(asking, 10) == "other"
        assert gone.restarts == 0, "it is not to come back"

    run_virtual(main())


def test_the_late_news_of_a_death_does_not_condemn_the_new_process():
    """A call that was abandoned may take its time to fail; by then the worker is another one."""

    async def dies_at_once():
        raise WorkerDied("first")

    async def dies_late():
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            await asyncio.sleep(10)
            raise WorkerDied("late news") from None

    async def main():
        role = Echo("e0")
        echoes = fleet(role)
        (worker,) = echoes.workers
        late = asyncio.ensure_future(echoes.call(worker, dies_late()))
        await asyncio.sleep(1)
        with pytest.raises(WorkerDied, match="first"):
            await echoes.call(worker, dies_at_once())
        await asyncio.sleep(5)
        assert worker.state == "up" and role.restarts == 1
        with pytest.raises(WorkerDied, match="late"):
            await late
        await asyncio.sleep(5)
        assert worker.state == "up" and role.restarts == 1

    run_virtual(main())


def test_tries_move_between_workers_and_the_last_error_is_the_reason():
    async def main():
        echoes = fleet(Echo("e0"), Echo("e1"))
        asked = []

        async def fails(role):
            asked.append(role.name)
            raise RoleError(f"no {len(asked)}")

        with pytest.raises(GroupLost, match="echo: RoleError: no 3"):
            await echoes.do(fails, witness=Nobody())
        assert asked == ["e0", "e1", "e0"]
        assert echoes.retries == 2

    run_virtual(main())


def test_restarts_that_were_not_its_fault_leave_a_worker_its_own():
    async def main():
        role, recoveries = Echo("e0"), []

        def spawn(work):
            recoveries.append(asyncio.create_task(work))
            return recoveries[-1]

        echoes = Fleet("echo", [role], max_restarts=1, tries=1, spawn=spawn)
        for error in (HeldUp("a"), HeldUp("b"), WorkerDied("c"), HeldUp("d")):
            echoes.condemn(echoes.workers[0], error)
            await recoveries[-1]
            assert echoes.workers[0].state == "up"
        echoes.condemn(echoes.workers[0], WorkerDied("e"))
        with pytest.raises(FleetExhausted):
            await recoveries[-1]
        assert role.restarts == 4

    run_virtual(main())


def test_a_cancelled_call_is_not_tried_again():
    async def main():
        echoes = fleet(Echo("e0"))
        calls = []

        async def sleeps(role):
            calls.append(role)
            await asyncio.sleep(100)

        work = asyncio.ensure_future(echoes.do(sleeps, witness=Nobody()))
        await asyncio.sleep(1)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert len(calls) == 1
        assert asyncio.get_running_loop().time() == 1.0

    run_virtual(main())


def test_no_work_between_a_failed_load_and_the_next():
    async def main():
        role = FakeGenerator("g0", load_seconds=fixed(1.0), faults=Faults(load={2: "mismatch"}))
        generators = Generators(
            [role], max_restarts=1, tries=1, spawn=lambda work: pytest.fail("no recovery is due")
        )
        learner = FakeLearner(publish_seconds=fixed(0.0))
        assert generators.usable() == []
        await generators.load(await learner.publish())
        assert len(generators.usable()) == 1
        learner.version = 1
        load = asyncio.ensure_future(generators.load(await learner.publish()))
        await asyncio.sleep(0.5)
        assert len(generators.usable()) == 1, "the old weights still serve"
        await asyncio.sleep(1.0)
        assert generators.usable() == []
        await load
        assert len(generators.usable()) == 1 and generators.reloads == 1

    run_virtual(main())


def test_a_restarting_generator_loads_what_was_published_meanwhile():
    async def main():
        async with asyncio.TaskGroup() as tasks:
            role = FakeGenerator("g0", load_seconds=fixed(2.0), restart_seconds=fixed(1.0))
            generators = Generators([role], max_restarts=1, tries=1, spawn=tasks.create_task)
            learner = FakeLearner(publish_seconds=fixed(0.0))
            await generators.load(await learner.publish())
            generators.condemn(generators.workers[0], WorkerDied("by the test"))
            await asyncio.sleep(2)  # it restarted, and is loading version 0
            learner.version = 1
            began = asyncio.get_running_loop().time()
            await generators.load(await learner.publish())
            assert asyncio.get_running_loop().time() == began, "nobody waits for it"
            await asyncio.sleep(2)
            assert generators.usable() == []
            await asyncio.sleep(2)
            assert role.loaded == [0, 0, 1] and len(generators.usable()) == 1

    run_virtual(main())


def test_work_goes_where_the_fewest_tokens_are_in_flight():
    async def main():
        echoes = fleet(*(Echo(f"e{i}") for i in range(3)))
        asked = []

        async def lasts(role, seconds):
            asked.append(role.name)
            await asyncio.sleep(seconds)

        def give(load, seconds):
            work = echoes.do(lambda role: lasts(role, seconds), witness=Nobody(), load=load)
            return asyncio.ensure_future(work)

        tasks = []
        for load, seconds in ((9, 100), (5, 2), (7, 100), (3, 100)):
            tasks.append(give(load, seconds))
            await asyncio.sleep(0.001)
        assert asked == ["e0", "e1", "e2", "e1"]  # e1 has 5 tokens, then 8
        await asyncio.sleep(3)  # e1 is rid of its 5
        tasks.append(give(1, 1))
        await asyncio.sleep(1)
        assert asked[-1] == "e1"
        await asyncio.gather(*tasks)
        assert [worker.load for worker in echoes.workers] == [0, 0, 0]

    run_virtual(main())


def test_the_shortlist_agrees_with_a_search_through_all():
    rng = random.Random(0)
    workers = [Worker(Echo(f"e{i}")) for i in range(20)]
    shortlist = Shortlist()
    shortlist.renew(workers)
    for _ in range(5000):
        worker = rng.choice(workers)
        if rng.random() < 0.1:
            worker.state = "up" if worker.state == "retired" else "retired"
        else:
            worker.load = rng.randrange(10)
        shortlist.push(worker)
        but = rng.choice([None, *workers])
        up = [w for w in workers if w.state == "up"]
        best = min((w.load for w in up if w is not but), default=None)
        found = shortlist.least(lambda w: w.state == "up", but)
        if best is None:
            assert found is (but if but in up else None)
        else:
            assert found is not None and found is not but
            assert found.state == "up" and found.load == best
