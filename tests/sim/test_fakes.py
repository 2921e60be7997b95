"""The fakes keep the roles' contracts: what the driver's tests rest on."""

from __future__ import annotations

import asyncio
import statistics

import pytest

from distrl.records import Weights
from distrl.roles import CanaryMismatch, Generator, Learner, RoleError, Scorer, WorkerDied
from distrl.sim import (
    CountingSource,
    FakeGenerator,
    FakeLearner,
    FakeScorer,
    Faults,
    fixed,
    log_normal,
    run_virtual,
)


async def weights(version):
    learner = FakeLearner(publish_seconds=fixed(0.0))
    learner.version = version
    return await learner.publish()


def test_they_are_roles():
    generator: Generator = FakeGenerator("g")
    scorer: Scorer = FakeScorer("s")
    learner: Learner = FakeLearner()
    assert (generator.name, scorer.name) == ("g", "s") and learner is not None
    assert Weights.__name__ == "Weights"


def test_spans_follow_the_loads_in_flight():
    """8 tokens in 8 s; loads end at 2.5 s and 6.5 s: tokens sampled at 3 s and 7 s are new."""

    async def main():
        generator = FakeGenerator("g", seconds=fixed(8.0), load_seconds=fixed(0.0))
        await generator.load_weights(await weights(4))
        call = asyncio.ensure_future(generator.generate(CountingSource().next()))
        for version in (5, 6):
            await asyncio.sleep(2.5 if version == 5 else 4.0)
            await generator.load_weights(await weights(version))
        parcel = await call
        spans = [(s.version, s.start, s.end) for s in parcel.payload.spans[0]]
        assert spans == [(4, 0, 3), (5, 3, 7), (6, 7, 8)]
        assert (parcel.info.oldest_version, parcel.info.newest_version) == (4, 6)
        assert parcel.info.seconds == 8.0

    run_virtual(main())


def test_a_death_fails_every_call_in_flight_until_the_restart():
    async def main():
        generator = FakeGenerator("g", faults=Faults(work={2: "die"}))
        await generator.load_weights(await weights(0))
        source = CountingSource()
        calls = [asyncio.ensure_future(generator.generate(source.next())) for _ in range(3)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, WorkerDied) for result in results)
        with pytest.raises(WorkerDied):
            await generator.load_weights(await weights(0))
        await generator.restart()
        await generator.load_weights(await weights(3))
        assert (await generator.generate(source.next())).info.oldest_version == 3

    run_virtual(main())


def test_hold_starts_all_together_once():
    async def main():
        generator = FakeGenerator("g", seconds=fixed(1.0))
        await generator.load_weights(await weights(0))
        source, loop = CountingSource(), asyncio.get_running_loop()
        await generator.hold(2)
        first = asyncio.ensure_future(generator.generate(source.next()))
        await asyncio.sleep(5)
        assert not first.done()
        await generator.generate(source.next())
        await asyncio.sleep(0)
        assert first.done()
        began = loop.time()
        await generator.generate(source.next())
        assert loop.time() == began + 1.0

    run_virtual(main())


def test_scripted_faults_have_their_types():
    async def main():
        generator = FakeGenerator("g", faults=Faults(load={1: "mismatch"}, work={1: "fail"}))
        with pytest.raises(CanaryMismatch):
            await generator.load_weights(await weights(0))
        await generator.load_weights(await weights(0))
        with pytest.raises(RoleError, match="scripted failure"):
            await generator.generate(CountingSource().next())

    run_virtual(main())


def test_log_normal_has_its_median_and_repeats_by_seed():
    one, two = log_normal(3.0, 0.5, 7), log_normal(3.0, 0.5, 7)
    draws = [one() for _ in range(2001)]
    assert draws == [two() for _ in range(2001)]
    assert statistics.median(draws) == pytest.approx(3.0, rel=0.05)


def test_a_run_of_the_learner_measures_ages_by_span(tmp_path):
    async def main():
        generator = FakeGenerator("g", load_seconds=fixed(0.0))
        await generator.load_weights(await weights(1))
        parcel = await generator.generate(CountingSource().next())
        learner = FakeLearner(skip={1})
        learner.version = 3
        report = await learner.learn([parcel.payload])
        assert (report.step, report.version, report.skipped) == (1, 3, True)
        assert learner.trained[0].age == 2
        await learner.save(tmp_path / "learner")
        other = FakeLearner()
        await other.load(tmp_path / "learner")
        assert (other.step, other.version) == (1, 3)

    run_virtual(main())
