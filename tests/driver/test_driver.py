"""A run without faults: order, versions, back-pressure, metrics."""

from __future__ import annotations

import asyncio

import pytest

from distrl.driver import DriverError, OutOfStep, Start
from distrl.metrics.names import METRICS
from distrl.records import StepReport
from distrl.roles import LearnerFailed
from distrl.sim import FakeGenerator, FakeLearner, FakeScorer, Faults, fixed, log_normal


def wild(name, seed, **options):
    return FakeGenerator(name, seconds=log_normal(1.0, 1.2, seed), **options)


@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_every_prompt_is_trained_once_in_the_order_of_issue(world, staleness):
    run = world(max_staleness=staleness, generators=[wild("g0", 1), wild("g1", 2)]).run()
    assert run.trained == list(range(24))
    assert run.source.cursor == 24, "nothing is issued that is not trained"
    assert max(run.ages) <= staleness
    assert (run.summary.step, run.summary.steps, run.summary.version) == (6, 6, 6)
    assert (run.summary.samples, run.summary.tokens) == (48, 48 * 8)
    assert not run.summary.stopped and run.summary.drops == {}


def test_the_bound_is_reached_where_the_learner_is_slow(world):
    """The proof's bound is tight: it is not kept by doing less than allowed."""
    run = world(max_staleness=2, steps=8, learner=FakeLearner(seconds=fixed(9.0))).run()
    assert max(run.ages) == 2
    assert run.column("staleness/max") == [0, 1, 2, 2, 2, 2, 2, 2]


def test_weights_reach_every_generator_before_the_first_prompt_and_after_each_step(world):
    run = world(max_staleness=1).run()
    for generator in run.generators:
        assert generator.loaded == list(range(7))
        assert all(held is not None for _, _, held in generator.served)
    assert run.learner.published == list(range(7))


def test_generation_goes_on_while_weights_are_loaded(world):
    """A sample in flight during the load carries both versions."""
    slow = [FakeGenerator("g0", seconds=fixed(3.0)), FakeGenerator("g1", seconds=fixed(5.0))]
    run = world(max_staleness=3, generators=slow).run()
    assert any(len(group.ages) > 1 for group in run.learner.trained)
    began = [when for g in run.generators for _, when, _ in g.served]
    assert len(set(began)) > 2


def test_the_learner_goes_on_while_weights_are_loaded(world):
    """It waits for a load only where it would publish again, or where no group is left to take."""
    loads_s = 0.75
    generators = [FakeGenerator(f"g{n}", load_seconds=fixed(loads_s)) for n in range(2)]
    run = world(max_staleness=3, generators=generators, learner=FakeLearner()).run()
    assert all(loads_s < seconds < loads_s + 0.1 for seconds in run.column("time/sync")[:-1])
    assert sum(run.column("time/idle_learner")[2:]) == 0
    assert run.column("time/step")[2:] == pytest.approx([1.05] * 4), "learn and publish"


def test_a_load_longer_than_a_step_holds_up_the_next_publication_and_checkpoint(world):
    generators = [FakeGenerator("g0", load_seconds=fixed(4.0))]
    run = world(max_staleness=3, generators=generators, checkpoint_every=3)
    seen = []
    publish, commit = run.learner.publish, run.checkpoints.commit

    async def publishes():
        seen.append((run.generators[0].loaded[-1:], "published"))
        return await publish()

    def commits(step, state):
        seen.append(([row_step for row_step, _ in run.sink.rows][-1:], f"committed {step}"))
        commit(step, state)

    run.learner.publish, run.checkpoints.commit = publishes, commits
    run.run()
    published = [held for held, what in seen if what == "published"]
    assert published == [[], [0], [1], [2], [3], [4], [5]]
    assert [seen for seen in seen if "committed" in seen[1]] == [
        ([3], "committed 3"), ([6], "committed 6"),
    ]  # fmt: skip
    after_a_save = 4.0 + 1.0 + 0.05  # a step without a load beside it
    assert run.column("time/step")[2:] == pytest.approx([4.05, after_a_save, 4.05, 4.05])
    assert run.column("time/idle_learner")[2] == pytest.approx(3.0)


def test_lockstep_is_one_batch_after_the_other_dealt_round(world):
    generators = [wild("g0", 3), wild("g1", 4)]
    run = world(max_staleness=0, steps=3, generators=generators).run()
    assert [group.version for group in run.learner.trained] == [0] * 4 + [1] * 4 + [2] * 4
    assert set(run.ages) == {0}
    assert [g.held for g in generators] == [[2, 2, 2], [2, 2, 2]]
    assert [index for index, _, _ in generators[0].served] == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("seed", [3, 4])
def test_lockstep_scores_what_was_generated_together_whoever_came_first(world, seed):
    """Else the last bits of a reward would depend on what it shared a forward pass with."""
    generators = [wild("g0", seed), wild("g1", seed + 1)]
    scorers = [FakeScorer(f"s{i}", seconds=log_normal(0.1, 1.0, seed + i)) for i in range(2)]
    world(max_staleness=0, steps=3, generators=generators, scorers=scorers).run()
    for place, scorer in enumerate(scorers):
        assert [index for _, index in scorer.asked] == list(range(place, 12, 2))
    passes = [{when for when, _ in scorer.asked} for scorer in scorers]
    assert passes[0] == passes[1] and len(passes[0]) == 3


def test_lockstep_does_not_wait_for_what_is_given_up(world):
    """Groups 1 and 2 are lost, and the two that come for them are scored together likewise."""
    losing = Faults(work={2: "fail", 3: "fail"})
    generators = [FakeGenerator("g0", seconds=fixed(1.0), faults=losing)]
    scorer = FakeScorer("s0")
    run = world(max_staleness=0, steps=1, attempts=1, generators=generators, scorers=[scorer]).run()
    assert run.trained == [0, 3, 4, 5]
    passes = [index for _, index in sorted(scorer.asked)]
    assert passes == [0, 3, 4, 5] and len({when for when, _ in scorer.asked}) == 2


def test_lockstep_deals_an_uneven_batch(world):
    generators = [FakeGenerator(f"g{i}") for i in range(3)]
    run = world(max_staleness=0, steps=1, prompts_per_step=4, generators=generators).run()
    assert [g.held for g in generators] == [[2], [1], [1]]
    run = world(max_staleness=0, steps=1, prompts_per_step=1, generators=generators[:2]).run()
    assert run.trained == [0]


def test_work_goes_to_the_least_loaded_generator(world):
    slow, fast = FakeGenerator("slow", seconds=fixed(8.0)), FakeGenerator("fast")
    world(max_staleness=2, steps=30, generators=[slow, fast]).run()
    assert len(fast.served) > 1.5 * len(slow.served)


def test_a_slow_learner_stops_admission(world):
    run = world(max_staleness=1, learner=FakeLearner(seconds=fixed(50.0)))

    async def watch(driver):
        await asyncio.sleep(40)  # the first step is under way, everything else waits for it
        assert run.source.cursor == 8
        assert driver._admission.in_flight == 0
        assert driver._buffer.groups == 4

    run.run(watch)
    assert run.column("time/idle_learner")[1:] == [0.0] * 5
    assert run.column("driver/lead") == [1.0] * 5 + [0.0]
    assert run.column("buffer/groups")[1] == 4


def test_slow_generators_show_as_idle_time_of_the_learner(world):
    generators = [FakeGenerator("g0", seconds=fixed(50.0))]
    run = world(max_staleness=1, generators=generators).run()
    assert sum(run.column("time/idle_learner")) > 0.8 * run.summary.seconds


def test_bytes_in_the_buffer_stay_below_the_bound(world):
    """A group weighs 2 samples x 2000 tokens x 8 bytes = 32,000 bytes; six fit into 0.2 MiB."""
    peak = 0

    def generators():
        return [FakeGenerator("g0", length=lambda prompt: 2000, seconds=log_normal(0.1, 1, 1))]

    async def watch(driver):
        nonlocal peak
        while driver._progress.step < 6:
            peak = max(peak, driver._buffer.nbytes)
            await asyncio.sleep(0.01)

    def run(mib):
        nonlocal peak
        peak = 0
        learner = FakeLearner(seconds=fixed(20.0))
        return world(max_staleness=4, generators=generators(), learner=learner, buffer_mib=mib).run(
            watch
        )

    assert run(0.2).trained == list(range(24))
    assert 5 * 32_000 < peak <= 0.2 * 2**20
    run(100)
    assert peak == 16 * 32_000, "without a bound the buffer holds four batches beside the step"
    assert run(0.001).trained == list(range(24)), "a batch may always land"
    assert peak == 4 * 32_000


def test_a_batch_that_is_taken_makes_room_at_once(world):
    """Not only when its step ends: the bytes left the buffer."""

    async def hook(step, payloads):
        await asyncio.sleep(1)  # the feed loop looks for room before the next batch is taken

    generators = [FakeGenerator("g0", length=lambda prompt: 2000)]
    learner = FakeLearner(seconds=fixed(20.0))
    run = world(max_staleness=4, generators=generators, learner=learner, buffer_mib=0.2, hook=hook)

    async def watch(driver):
        await asyncio.sleep(30)  # in the second step; six groups fit beside it
        assert driver._buffer.groups == 6
        assert run.source.cursor == 4 + 4 + 6

    run.run(watch)


def test_a_skipped_step_publishes_nothing_and_frees_its_slots(world):
    run = world(max_staleness=1, steps=8, learner=FakeLearner(skip={2, 3, 6})).run()
    assert run.trained == list(range(32))
    assert run.learner.published == [0, 1, 2, 3, 4, 5]
    assert max(run.ages) <= 1
    assert (run.summary.step, run.summary.version) == (8, 5)


def test_every_step_has_one_row_with_the_documented_names(world):
    run = world(max_staleness=1).run()
    assert [step for step, _ in run.sink.rows] == [1, 2, 3, 4, 5, 6]
    rooms = {"staleness", "rollout", "buffer", "time", "samples", "tokens"}
    documented = {name for name in METRICS if name.split("/")[0] in rooms}
    by_driver = documented - {"time/learn_compute"} | {"reward/mean", "reward/std"}
    for _, row in run.sink.rows:
        assert by_driver <= row.keys()
    assert run.column("samples/total") == [8, 16, 24, 32, 40, 48]
    assert run.column("tokens/total")[-1] == 48 * 8
    assert run.column("reward/mean")[1] == 5.5  # indices 4 to 7
    assert run.column("rollout/length_mean") == [8.0] * 6
    seconds = sum(run.column("time/step"))
    seconds += run.column("time/sync")[-1] - run.column("time/publish")[-1]  # the last load
    assert seconds == pytest.approx(run.summary.seconds, rel=0.02)
    rate = run.column("rollout/tokens_per_second")
    assert sum(r * s for r, s in zip(rate, run.column("time/step"), strict=True)) == pytest.approx(
        24 * 16
    )


def test_age_splits_into_flight_and_buffer(world):
    run = world(max_staleness=2, steps=8, learner=FakeLearner(seconds=fixed(9.0))).run()
    for _, row in run.sink.rows:
        assert row["staleness/mean"] == row["staleness/in_flight"] + row["staleness/in_buffer"]
        assert sum(row["staleness/hist"]) == 4 * 16
    assert run.column("staleness/in_buffer")[-1] == 2.0


def test_the_learners_own_staleness_wins(world):
    learner = FakeLearner(metrics=lambda: {"staleness/mean": 0.125, "kl/ref": 2.0})
    run = world(learner=learner).run()
    assert set(run.column("staleness/mean")) == {0.125}
    assert set(run.column("kl/ref")) == {2.0}


def test_the_hook_sees_the_payloads_of_each_step(world):
    seen = {}

    async def hook(step, payloads):
        seen[step] = [payload.index for payload in payloads]

    world(steps=2, hook=hook).run()
    assert seen == {1: [0, 1, 2, 3], 2: [4, 5, 6, 7]}


def test_the_learners_failure_ends_the_run(world):
    with pytest.raises(LearnerFailed, match="scripted"):
        world(learner=FakeLearner(fail=3)).run()


@pytest.mark.parametrize("part", ["generate", "score", "hook", "load"])
def test_a_bug_in_any_part_ends_the_run_with_that_exception(world, part):
    """No task swallows what it does not know. LeftoverTasks would show one that lives on."""

    async def bug(*_):
        await asyncio.sleep(0.01)
        raise ZeroDivisionError(part)

    run = world(hook=bug if part == "hook" else None)
    if part == "generate":
        run.generators[1].generate = bug
    if part == "score":
        run.scorers[0].score = bug
    if part == "load":
        load = run.generators[0].load_weights
        run.generators[0].load_weights = lambda w: bug() if w.version == 2 else load(w)
    with pytest.raises(ZeroDivisionError, match=part):
        run.run()


def test_weights_that_the_learner_refuses_to_publish_end_the_run(world):
    run = world()

    async def refuse():
        raise ValueError("weights hold a NaN")

    run.learner.publish = refuse
    with pytest.raises(ValueError, match="NaN"):
        run.run()


@pytest.mark.parametrize("report", [(1, 2), (2, 1), (1, 0)])
def test_a_learner_that_counts_otherwise_is_stopped(world, report):
    run = world()

    async def learn(payloads, *, oldest=0):
        return StepReport(step=report[0], version=report[1], skipped=False, metrics={})

    run.learner.learn = learn
    with pytest.raises(OutOfStep, match="step 1 and version 1 were due"):
        run.run()


def test_a_source_out_of_order_is_stopped(world):
    run = world()
    run.source.seek = lambda cursor: None
    run.source.cursor = 3
    with pytest.raises(OutOfStep, match="index 3 where 0 was due"):
        run.run()


def test_a_group_of_the_wrong_size_is_stopped(world):
    with pytest.raises(DriverError, match="2 samples were due"):
        world(generators=[FakeGenerator("g0", samples=3)]).run()


def test_a_finished_run_does_nothing_more(world):
    run = world(start=Start(step=6, version=6, cursor=24)).run()
    assert run.summary.steps == 0
    assert run.trained == [] and run.checkpoints.states == {}
