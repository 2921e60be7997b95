"""Ten thousand random schedules: whatever happens, the promise holds.

Each draws bound, lead, window, what happens to stale groups, numbers and speeds of workers, their
failures, deaths and hangs, generators that join and leave, and moments at which the run is
stopped or killed and goes on from its newest checkpoint. The virtual clock itself fails a run
that deadlocks, livelocks, or leaves a task behind.

What is checked rests on the learner's own list of what it trained on, kept apart from all that
the driver says.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import random
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from distrl.driver import DriverError, Start
from distrl.driver.audit import audit
from distrl.sim import FakeGenerator, FakeLearner, FakeScorer, Faults, log_normal
from distrl.sim.script import Fault

SCHEDULES = 10_000
SHARDS = 20
KINDS: tuple[Fault, ...] = ("mismatch", "fail", "die")


class Schedule:
    """One random run, perhaps in several lives."""

    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        bound = draw.choice([0, 1, 1, 2, 3])
        lead = bound + draw.choice([0, 0, 0, 1, 2])
        batch = draw.randint(1, 4)
        self.settings = {
            "steps": draw.randint(2, 6),
            "prompts_per_step": batch,
            "max_staleness": bound,
            "lead": lead,
            "window": draw.choice([0, 0, draw.randint(0, lead * batch)]),
            "on_stale": draw.choice(["drop", "mask"]),
            "max_restarts": 1000,
            "stall_timeout_s": 1e5,
            "checkpoint_every": draw.randint(1, 4),
            "buffer_mib": draw.choice([0.0005, 0.004, 100]),
        }
        self.faulty = draw.random() < 0.6
        self.generators = 0

    def seconds(self, low, high):
        draw = self.draw
        median = draw.choice([low, (low * high) ** 0.5, high])
        return log_normal(median, draw.choice([0.0, 0.5, 1.5]), draw.randrange(10**9))

    def generator(self):
        draw = self.draw
        self.generators += 1
        loads = {draw.randint(1, 6): draw.choice(KINDS) for _ in range(draw.randint(0, 2))}
        return FakeGenerator(
            f"g{self.generators}",
            seconds=self.seconds(0.1, 10),
            load_seconds=self.seconds(0.01, 3),
            restart_seconds=self.seconds(0.1, 20),
            length=lambda prompt: 1 + prompt.index * 7 % 40,
            faults=self.faults(loads),
        )

    def faults(self, loads):
        draw = self.draw
        if not self.faulty:
            return Faults()
        return Faults(
            rate=draw.choice([0.0, 0.02, 0.2]),
            death_rate=draw.choice([0.0, 0.0, 0.03]),
            load=loads,
            seed=draw.randrange(10**9),
        )

    def parts(self):
        draw, rate = self.draw, self.draw.choice([0.0, 0.1]) if self.faulty else 0.0
        skip = {step for step in range(9) if self.faulty and draw.random() < 0.1}
        return {
            "generators": [self.generator() for _ in range(draw.randint(1, 4))],
            "scorers": [
                FakeScorer(f"s{i}", seconds=self.seconds(0.01, 3), faults=Faults(rate=rate, seed=i))
                for i in range(draw.randint(1, 3))
            ],
            "learner": FakeLearner(
                seconds=self.seconds(0.1, 10), publish_seconds=self.seconds(0.01, 1), skip=skip
            ),
        }

    async def during(self, driver):
        """Let generators come and go; then perhaps stop or kill the run."""
        draw = self.draw
        for _ in range(draw.choice([0, 0, 1, 3])):
            await asyncio.sleep(draw.uniform(0, 8))
            with suppress(ValueError, DriverError):  # the last one may not go; the run may be over
                if draw.random() < 0.5:
                    driver.add_generator(self.generator())
                else:
                    driver.remove_generator(draw.choice(driver._generators.workers).role.name)
        end = draw.choice(["none", "none", "stop", "kill"])
        if end != "none":
            await asyncio.sleep(draw.uniform(0, 20))
        if end == "stop":
            driver.stop()
        elif end == "kill" and self.life is not None and not self.life.done():
            self.life.cancel()

    life: asyncio.Task | None = None


def lives(schedule, world, ledger):
    """The runs of a schedule, until one reaches its last step; each from the newest checkpoint."""
    start, runs = None, []
    for life in range(6):
        run = world(**schedule.parts(), **schedule.settings, start=start)
        run.ledger = ledger
        gentle = life == 5

        async def during(driver, gentle=gentle):
            if not gentle:
                await schedule.during(driver)

        with suppress(asyncio.CancelledError):
            run.run(during, on_life=lambda task: setattr(schedule, "life", task))
        runs.append(run)
        if run.checkpoints.states:
            step = max(run.checkpoints.states)
            folder = run.checkpoints.folder / f"step_{step:06d}"
            start = Start.from_state(run.checkpoints.states[step], folder)
        if start is not None and start.step == schedule.settings["steps"]:
            return runs, start
    raise AssertionError("not finished after six lives")


def check(schedule, runs, start):
    """Bound, exactly once over all lives, order within the window, memory."""
    batch, window = schedule.settings["prompts_per_step"], schedule.settings["window"]
    kept: list[int] = []
    for number, run in enumerate(runs):
        assert max(run.ages, default=0) <= schedule.settings["max_staleness"]
        # What a later life did not start from was rolled back.
        later = [r.start.step if r.start else 0 for r in runs[number + 1 :]]
        goes_to = min(later, default=start.step)
        trained = [seen.index for seen in run.learner.trained if seen.step <= goes_to]
        kept += trained
        settled: set[int] = set()
        for index in trained:
            settled.add(index)
            overtaken = [i for i in range(index) if i not in settled and i in set(trained)]
            assert len(overtaken) <= window + 1 and all(index - i <= window for i in overtaken)
        assert run.checkpoints.states.keys() <= {row_step for row_step, _ in run.sink.rows}
        slots = run.config.slots
        assert all(held <= slots for held in run.column("buffer/groups"))
    assert len(kept) == len(set(kept)) == schedule.settings["steps"] * batch, "each at most once"
    issued = start.cursor + len(start.ahead)
    below = [index for index in kept if index < start.cursor]
    above = [index for index in kept if index >= start.cursor]
    assert set(above) <= set(start.ahead)
    assert issued >= len(kept)
    lost = start.cursor - len(below) + len(start.ahead) - len(above)
    assert lost == sum(start.drops.values()), "the rest is listed as dropped"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_promise_holds_on_ten_thousand_schedules(world, tmp_path):
    """On all cores; the processes are forked, for a world cannot be pickled.

    What other tests left behind must not be collected in them: a gloo group, say, would wait there
    for threads that only its own process has.
    """
    work = partial(_shard, tmp_path)
    _worlds.append(world)
    gc.collect()
    gc.freeze()
    try:
        with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
            for _ in pool.imap_unordered(work, range(SHARDS)):
                pass
    finally:
        gc.unfreeze()


_worlds: list[Any] = []


def _shard(folder, shard):
    for number in range(SCHEDULES // SHARDS):
        seed = shard * 1_000_003 + number
        schedule = Schedule(seed)
        # SQLite waits for the disk: every fiftieth schedule keeps its ledger, and is audited.
        ledger = folder / f"{seed}.sqlite" if number % 50 == 0 else None
        try:
            runs, start = lives(schedule, _worlds[-1], ledger)
            check(schedule, runs, start)
            if ledger is not None:
                audited(ledger, schedule.settings["steps"])
        except BaseException as error:
            error.add_note(f"schedule {seed}: {schedule.settings}")
            raise


def audited(ledger, steps):
    metrics = ledger.with_suffix(".jsonl")
    metrics.write_text("".join(f'{{"step": {n}}}\n' for n in range(1, steps + 1)))
    report = audit(ledger, metrics)
    broken = [f for f in report.findings if not f.holds and "lengths" not in f.promise]
    assert not broken, broken
    os.remove(ledger)
