"""stop(), cancellation, the watchdog, checkpoints, and going on from them."""

from __future__ import annotations

import asyncio

import pytest
from safetensors import SafetensorError

from distrl.checkpoint import Checkpoints
from distrl.disk import NotWritten
from distrl.driver import DriverError, OutOfStep, Stalled, Start
from distrl.roles import LearnerFailed
from distrl.sim import (
    FakeGenerator,
    FakeLearner,
    FakeScorer,
    Faults,
    fixed,
    log_normal,
    run_virtual,
)


def parts(seed):
    generators = [
        FakeGenerator(f"g{i}", seconds=log_normal(1.0, 1.0, 10 * seed + i)) for i in (0, 1)
    ]
    # "p5" and "p14" cannot be scored by anyone, ever.
    scorer = FakeScorer("s0")
    score = scorer.score

    async def picky(group):
        if group.info.index in (5, 14):
            scorer._faults = Faults(rate=1.0)
        try:
            return await score(group)
        finally:
            scorer._faults = Faults()

    scorer.score = picky
    return {"generators": generators, "scorers": [scorer]}


def test_a_full_disk_ends_the_run_with_a_word(world):
    """The learner writes its part of a checkpoint in a process of its own."""

    class Full(FakeLearner):
        async def save(self, folder):
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(NotWritten, match=r"checkpoint of step 2 .*No space left.*--resume"):
        world(learner=Full(), checkpoint_every=2).run()


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("stop_s", [0.0, 0.1, 2.0, 4.7, 6.3, 9.9])
def test_stop_and_resume_train_every_prompt_exactly_once(world, staleness, stop_s):
    settings = {"steps": 7, "max_staleness": staleness}

    async def stop(driver):
        await asyncio.sleep(stop_s)
        driver.stop()
        driver.stop()

    first = world(**parts(1), **settings).run(stop)
    assert first.summary.stopped and first.summary.step < 7
    step = first.summary.step
    assert [row_step for row_step, _ in first.sink.rows] == list(range(1, step + 1))
    start = None
    if step:
        state = first.checkpoints.states[step]
        assert list(first.checkpoints.states) == [step]
        assert state["wandb_id"] == "abc"
        assert state["samples"] == 8 * step == first.summary.samples
        assert state["drops"] == first.summary.drops
        start = Start.from_state(state, first.checkpoints.folder / f"step_{step:06d}")
    else:
        assert first.checkpoints.states == {}

    second = world(**parts(2), **settings, start=start).run()
    assert second.summary.step == 7 and second.summary.steps == 7 - step
    assert first.trained + second.trained == [i for i in range(30) if i not in (5, 14)]
    assert sum(second.summary.drops.values()) == 2
    assert second.summary.samples == 56
    assert [s for s, _ in second.sink.rows] == list(range(step + 1, 8))
    assert second.learner.version == 7
    assert max(second.ages) <= staleness


def test_a_run_goes_on_from_a_checkpoint_on_disk(world, tmp_path):
    first = world(steps=9, checkpoint_every=4)
    first.checkpoints = Checkpoints(tmp_path / "checkpoints")

    async def stop(driver):
        await asyncio.sleep(7)
        driver.stop()

    first.run(stop)
    latest = Checkpoints(tmp_path / "checkpoints").latest()
    assert latest is not None and latest.step == first.summary.step
    second = world(steps=9, checkpoint_every=4, start=Start.from_state(latest.state, latest.path))
    second.checkpoints = Checkpoints(tmp_path / "checkpoints")
    second.run()
    assert first.trained + second.trained == list(range(36))
    assert Checkpoints(tmp_path / "checkpoints").committed() == [8, 9]


def test_a_run_without_steps_left_ends_with_the_weights_that_it_had(world):
    """It was killed before its policy was exported, say."""
    first = world(steps=3).run()
    start = Start.from_state(first.checkpoints.states[3], first.checkpoints.folder / "step_000003")
    second = world(steps=3, start=start).run()
    assert (second.summary.step, second.summary.steps) == (3, 0)
    assert second.learner.version == 3
    assert not second.trained and not second.learner.published


def test_stop_finishes_the_step_under_way_but_loads_no_weights(world):
    run = world(max_staleness=1, learner=FakeLearner(seconds=fixed(10.0)))

    async def stop(driver):
        await asyncio.sleep(5)
        issued = run.source.cursor
        driver.stop()
        await asyncio.sleep(4)
        assert run.source.cursor == issued

    run.run(stop)
    assert run.summary.step == 1
    assert run.generators[0].loaded == [0]
    assert run.checkpoints.states[1]["cursor"] == 4
    assert run.checkpoints.states[1]["version"] == 1


def test_stop_while_waiting_for_groups_ends_at_once(world):
    generators = [FakeGenerator("g0", seconds=fixed(100.0))]

    async def stop(driver):
        await asyncio.sleep(5)
        driver.stop()

    run = world(generators=generators).run(stop)
    assert run.summary.seconds == 5.0 and run.summary.step == 0


def test_nothing_is_admitted_after_stop(world):
    """Drops go on while the learner ends its step; they are not replaced any more."""
    generators = [FakeGenerator("g0", seconds=fixed(3.0))]
    scorers = [FakeScorer("s0", faults=Faults(rate=0.5))]
    learner = FakeLearner(seconds=fixed(50.0))
    run = world(
        max_staleness=3, generators=generators, scorers=scorers, learner=learner, attempts=1
    )
    issued = []

    async def stop(driver):
        while driver._progress.doing != "in the learner's step 1":
            await asyncio.sleep(0.5)
        assert driver._admission.in_flight
        issued.append(run.source.cursor)
        driver.stop()

    run.run(stop)
    assert [run.source.cursor] == issued
    assert run.summary.step == 1


def test_workers_that_die_while_the_run_ends_do_not_hurt_the_last_step(world):
    run = world(learner=FakeLearner(seconds=fixed(10.0)), max_restarts=0)

    async def stop(driver):
        await asyncio.sleep(1.5)
        assert driver._admission.in_flight
        driver.stop()
        for generator in run.generators:
            await generator.close()

    run.run(stop)
    assert run.summary.stopped and run.summary.step == 1
    assert 1 in run.checkpoints.states


def test_checkpoints_are_written_when_due_and_at_the_end(world):
    run = world(steps=7, checkpoint_every=3).run()
    assert list(run.checkpoints.states) == [3, 6, 7]
    assert [s["cursor"] for s in run.checkpoints.states.values()] == [12, 24, 28]
    assert world(steps=6, checkpoint_every=3).run().checkpoints.states.keys() == {3, 6}


def test_a_resumed_learner_must_have_the_version_of_the_checkpoint(world):
    """A learner that silently starts from version 0 would make every token look young."""
    first = world(steps=2).run()
    state = {**first.checkpoints.states[2], "version": 7}
    start = Start.from_state(state, first.checkpoints.folder / "step_000002")
    with pytest.raises(OutOfStep, match="version 2 where 7 was due"):
        world(steps=4, start=start).run()


def test_cancelling_the_run_cancels_everything(world):
    run = world()

    async def main():
        task = asyncio.ensure_future(run._run(None))
        await asyncio.sleep(3.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.get_running_loop().time() == pytest.approx(3.3), "at once"

    run_virtual(main())  # raises LeftoverTasks where anything lives on


def test_the_watchdog_names_the_prompts_and_who_has_them(world):
    generators = [FakeGenerator("g0", faults=Faults(work={2: "hang"})), FakeGenerator("g1")]
    run = world(generators=generators, stall_timeout_s=60)
    with pytest.raises(Stalled) as caught:
        run.run()
    message = str(caught.value)
    assert "stall_timeout_s=60" in message
    assert "(p2): with g0" in message
    assert "p0)" not in message
    assert "waiting for groups" in message


def test_a_group_that_lands_is_progress(world):
    durations = iter([50.0, 100.0, 150.0, 200.0])
    generators = [FakeGenerator("g0", seconds=lambda: next(durations))]
    run = world(generators=generators, stall_timeout_s=60, steps=1).run()
    assert run.trained == [0, 1, 2, 3]


def test_the_watchdog_sees_a_learner_that_hangs(world):
    run = world(learner=FakeLearner(seconds=fixed(1e5)), stall_timeout_s=60)
    with pytest.raises(Stalled, match="in the learner's step 1"):
        run.run()


def test_the_watchdog_sees_a_start_that_hangs(world):
    generators = [FakeGenerator("g0", faults=Faults(load={1: "hang"}))]
    with pytest.raises(Stalled, match="loading version 0 on the generators"):
        world(generators=generators, stall_timeout_s=60).run()


@pytest.mark.parametrize("checkpoint_every", [3, 100])
def test_the_watchdog_sees_a_last_checkpoint_that_hangs(world, checkpoint_every):
    class Hangs(FakeLearner):
        async def save(self, folder):
            await asyncio.sleep(1e5)

    run = world(steps=3, learner=Hangs(), stall_timeout_s=60, checkpoint_every=checkpoint_every)
    with pytest.raises(Stalled, match="writing the checkpoint of step 3"):
        run.run()


def test_what_the_learner_said_is_not_hidden_by_who_dies_with_it(world):
    """Generators that die as they load, in the turn in which the learner fails."""
    for seconds in (2.0, 3.0):
        generators = [
            FakeGenerator(
                name,
                load_seconds=iter((0.1, seconds)).__next__,
                faults=Faults(load={2: "die"}),
            )
            for name in ("g0", "g1")
        ]
        learner = FakeLearner(fail=2, seconds=fixed(seconds))
        run = world(generators=generators, learner=learner, max_staleness=2, prompts_per_step=2)
        with pytest.raises(LearnerFailed, match="scripted failure of the learner"):
            run.run()


def test_a_run_in_which_every_group_is_dropped_stalls_and_says_why(world):
    scorers = [FakeScorer("s0", faults=Faults(rate=1.0))]
    with pytest.raises(Stalled, match="scripted failure"):
        world(scorers=scorers, stall_timeout_s=10).run()
    with pytest.raises(DriverError, match=r"100 groups in a row were given up.*scripted failure"):
        world(scorers=[FakeScorer("s0", faults=Faults(rate=1.0))], stall_timeout_s=1000).run()
