"""Workers that die, hang, fail, or hold the wrong weights."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3

import pytest

from distrl.actors.sending import deadline
from distrl.config import GenerateConfig
from distrl.driver import FleetExhausted
from distrl.roles import HeldUp, NeverScored, PayloadLost, RoleError, WorkerDied
from distrl.sim import FakeGenerator, FakeLearner, FakeScorer, Faults, fixed


def gen(name, **faults):
    return FakeGenerator(name, faults=Faults(**faults))


def scorer(name, **faults):
    return FakeScorer(name, faults=Faults(**faults))


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_dead_generators_groups_go_to_another_and_it_comes_back(world, staleness):
    generators = [gen("g0", work={5: "die"}), gen("g1")]
    run = world(max_staleness=staleness, steps=10, generators=generators).run()
    assert run.trained == list(range(40))
    assert generators[0].restarts == 1 == run.summary.restarts
    assert run.column("driver/retries")[-1] >= 1
    assert max(run.ages) <= staleness
    assert generators[0].served[-1][1] > 6, "it works again after its restart"
    assert all(held is not None for _, _, held in generators[0].served)


def test_the_only_generator_dies_and_the_run_goes_on_after_its_restart(world):
    generators = [gen("g0", work={3: "die", 9: "die"})]
    run = world(generators=generators).run()
    assert run.trained == list(range(24))
    assert generators[0].restarts == 2


def test_a_restarted_generator_loads_the_current_weights_before_it_gets_work(world):
    """It restarts for 5 s, while the learner goes on to publish."""
    generators = [gen("g0", work={3: "die"}), gen("g1")]
    run = world(max_staleness=1, steps=12, generators=generators).run()
    back = next(when for _, when, _ in generators[0].served if when > 5)
    held = [held for _, when, held in generators[0].served if when == back]
    assert held[0] is not None and held[0] >= 2
    assert max(run.ages) <= 1
    missed = set(range(13)) - set(generators[0].loaded)
    assert missed, "versions went by while it was away"


def test_a_generator_that_keeps_dying_is_retired_and_the_others_go_on(world):
    generators = [gen("g0", work={n: "die" for n in range(1, 9)}), gen("g1")]
    run = world(steps=20, generators=generators, max_restarts=2, attempts=20).run()
    assert run.trained == list(range(80))
    assert generators[0].restarts == 2
    assert len(generators[0].served) < 10
    assert run.column("driver/generators")[-1] == 1


def test_no_generator_left_is_an_error_that_names_the_causes(world):
    generators = [
        gen("g0", work={n: "die" for n in range(1, 99)}),
        gen("g1", restart={1: "fail", 2: "fail"}, work={2: "die"}),
    ]
    with pytest.raises(FleetExhausted) as caught:
        world(generators=generators, max_restarts=2, attempts=50).run()
    message = str(caught.value)
    assert "no generator is left" in message and "max_restarts=2" in message
    assert "g0: retired" in message and "WorkerDied" in message
    assert "g1: retired" in message and "scripted failure" in message


def test_no_scorer_left_is_an_error(world):
    scorers = [scorer("s0", work={n: "die" for n in range(1, 99)})]
    with pytest.raises(FleetExhausted, match="no scorer is left"):
        world(scorers=scorers, max_restarts=1, attempts=50).run()


def test_a_canary_mismatch_is_loaded_again(world):
    generators = [gen("g0", load={3: "mismatch"}), gen("g1")]
    run = world(max_staleness=1, generators=generators).run()
    assert run.trained == list(range(24))
    assert generators[0].loaded == list(range(7))
    assert generators[0].restarts == 0
    assert run.column("driver/reloads")[-1] == 1


def test_two_mismatches_restart_and_three_failures_in_a_row_retire(world):
    generators = [gen("g0", load={3: "mismatch", 4: "mismatch"}), gen("g1")]
    run = world(steps=12, generators=generators).run()
    assert generators[0].restarts == 1
    assert run.trained == list(range(48))

    faults = {n: "mismatch" for n in range(3, 99)}
    generators = [gen("g0", load=faults), gen("g1")]
    run = world(steps=30, generators=generators, max_restarts=2).run()
    assert generators[0].restarts == 2
    assert generators[0].loaded == [0, 1]
    assert run.trained == list(range(120))
    last = max(when for _, when, _ in generators[0].served)
    assert last < 5, "it got no work with weights that nobody proved"


def test_a_mismatch_at_the_start_keeps_a_generator_from_serving(world):
    generators = [gen("g0", load={1: "mismatch", 2: "mismatch", 3: "mismatch", 4: "mismatch"})]
    run = world(generators=generators).run()
    assert run.trained == list(range(24))
    assert generators[0].restarts == 2
    assert all(held is not None for _, _, held in generators[0].served)


def test_what_was_in_flight_during_a_mismatch_is_not_used(world):
    """Its tokens may come from weights that are neither the old nor the new ones."""
    durations = itertools.chain([1.0, 1.0], itertools.repeat(20.0))
    slow = FakeGenerator("g0", seconds=lambda: next(durations), faults=Faults(load={2: "mismatch"}))
    fast = FakeGenerator("g1", seconds=fixed(1.0))
    run = world(max_staleness=3, generators=[slow, fast], steps=3).run()
    assert run.trained == list(range(12))
    mismatch_s = 2.35
    in_flight = {index for index, when, _ in slow.served if 1.2 < when < mismatch_s}
    assert in_flight
    assert in_flight <= {index for index, when, _ in fast.served if when > mismatch_s}
    assert run.summary.seconds < 15, "nobody waited for the 20 s calls"


def test_a_load_that_kills_the_generator_restarts_it(world):
    generators = [gen("g0", load={2: "die"}), gen("g1")]
    run = world(steps=12, generators=generators).run()
    assert generators[0].restarts == 1
    assert run.trained == list(range(48))


class OnTime(FakeGenerator):
    """As the handle of an actor: a load that hangs ends at the driver's own deadline."""

    async def load_weights(self, weights):
        async with deadline(self.name, weights, 120):
            await super().load_weights(weights)


def test_a_load_that_hangs_costs_its_deadline_and_not_the_run(world):
    """Far below the driver's patience, which would end it."""
    hangs = OnTime("g0", faults=Faults(load={2: "hang"}))
    run = world(generators=[hangs, gen("g1")]).run()
    assert (hangs.restarts, run.summary.restarts) == (1, 1)
    assert run.trained == list(range(24))
    assert 120 < run.summary.seconds < 200


class StandsStill(OnTime):
    """As an engine that stands still from `at_s` on: it loses its requests, each at its deadline,
    until it is missed."""

    def __init__(self, name, at_s):
        super().__init__(name, seconds=fixed(20.0))
        self.at_s = at_s
        self.lost = 0

    def still(self):
        return self.restarts == 0 and asyncio.get_running_loop().time() >= self.at_s

    async def generate(self, prompt):
        limit_s = GenerateConfig().request_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                parcel = await super().generate(prompt)
                if self.still():
                    left_s = self.at_s + limit_s - asyncio.get_running_loop().time()
                    await self._process.wait(left_s)
                    self._process.die()
                    raise WorkerDied(f"{self.name}: no token in all that time")
                return parcel
        except TimeoutError:
            self.lost += 1
            raise RoleError(f"{self.name}: {prompt.prompt_id} took too long") from None

    async def load_weights(self, weights):
        async with deadline(self.name, weights, 120):
            await self._process.wait(None if self.still() else 0.1)
            await FakeGenerator.load_weights(self, weights)


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("staleness", [0, 1])
def test_an_engine_that_stands_still_costs_its_deadline_and_not_the_run(world, staleness, others):
    """With the limits as they come, and with nobody else to take over its groups."""
    still = StandsStill("g0", at_s=50.0)
    rest = [FakeGenerator(f"g{i}", seconds=fixed(20.0)) for i in range(1, 1 + others)]
    run = world(generators=[still, *rest], max_staleness=staleness).run()
    assert run.trained == list(range(24)) and run.summary.drops == {}
    assert still.restarts == 1 == run.summary.restarts
    assert others or still.lost, "the groups in flight were lost before it was missed"


class HangsAt(FakeScorer):
    """A scorer whose thread hangs at some groups: its answers are those of `LocalScorer`."""

    def __init__(self, name, poison):
        super().__init__(name)
        self.poison = poison
        self.stuck = None

    async def score(self, group):
        index = group.info.index
        if self.stuck is None and index in self.poison:
            self.stuck = asyncio.Event()
            await asyncio.sleep(120)
            asyncio.get_running_loop().call_soon(self.stuck.set)
            self.asked.append((asyncio.get_running_loop().time(), index))
            raise NeverScored(f"{self.name}: {index} hangs")
        if self.stuck is not None:
            await self.stuck.wait()
            raise HeldUp(f"{self.name}: a group hangs")
        return await super().score(group)

    async def restart(self):
        await super().restart()
        self.stuck = None


@pytest.mark.parametrize("staleness", [0, 1])
def test_groups_that_hang_a_scorer_are_dropped_and_do_not_use_up_its_restarts(world, staleness):
    """More of them than it has restarts, and it is the only one."""
    poison = {2, 6, 9, 13, 17}
    only = HangsAt("s0", poison)
    run = world(scorers=[only], max_staleness=staleness, steps=5, max_restarts=3).run()
    assert run.trained == [index for index in range(25) if index not in poison]
    assert sum(run.summary.drops.values()) == len(poison)
    assert all("NeverScored" in reason for reason in run.summary.drops)
    assert only.restarts == len(poison)
    assert all([index for _, index in only.asked].count(index) == 1 for index in poison)


def test_a_death_in_the_middle_of_a_load_does_not_load_twice(world):
    """The generate call dies first; the load under way belongs to the old process."""
    generators = [
        FakeGenerator("g0", load_seconds=fixed(3.0), faults=Faults(work={9: "die"})),
        FakeGenerator("g1", load_seconds=fixed(3.0)),
    ]
    run = world(max_staleness=3, steps=10, generators=generators).run()
    assert run.trained == list(range(40))
    assert generators[0].restarts == 1
    assert generators[0].loaded == sorted(set(generators[0].loaded))


def test_a_group_that_fails_everywhere_is_dropped_whole_and_replaced(world):
    generators = [gen("g0", work={1: "fail", 2: "fail", 3: "fail"})]
    run = world(generators=generators, steps=2, prompts_per_step=1, max_staleness=0).run()
    assert run.trained == [1, 2]
    (reason,) = run.summary.drops
    assert reason.startswith("generator: RoleError: g0") and run.summary.drops[reason] == 1
    assert run.column("driver/drops") == [1, 1]
    assert run.column("driver/retries") == [2, 2]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_score_that_fails_for_good_drops_the_group_and_is_never_a_number(world, staleness):
    scorers = [scorer("s0", work={n: "no_score" for n in (4, 5, 6)}), scorer("s1")]
    scorers[1].score = scorers[0].score
    run = world(scorers=scorers, max_staleness=staleness, attempts=1).run()
    assert len(run.trained) == 24 == len(set(run.trained))
    assert run.source.cursor == 27
    missing = set(range(27)) - set(run.trained)
    assert len(missing) == 3 and list(run.summary.drops.values()) == [3]
    assert run.trained == sorted(run.trained)
    assert max(run.ages) <= staleness
    assert "ScoreFailed" in next(iter(run.summary.drops))


def test_a_failed_score_is_tried_on_another_scorer(world):
    scorers = [scorer("bad", rate=1.0), scorer("good")]
    run = world(scorers=scorers, attempts=2).run()
    assert run.trained == list(range(24))
    assert run.summary.drops == {}
    assert sorted(scorers[1].scored) == list(range(24))


class Loses(FakeScorer):
    """Is given groups whose samples are gone with the machine of their generator: each of `gone` as
    often as it says."""

    def __init__(self, name, gone):
        super().__init__(name)
        self.gone = gone

    async def score(self, group):
        if self.gone.get(group.info.index, 0) > 0:
            self.gone[group.info.index] -= 1
            raise PayloadLost(f"{self.name}: a payload is lost")
        return await super().score(group)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_group_that_is_lost_before_it_was_scored_is_generated_anew(world, staleness, tmp_path):
    """No scorer is to blame, and none is asked a second time for what is not there."""
    gone = {5: 1, 9: 2}
    scorers = [Loses("s0", gone), Loses("s1", gone)]
    run = world(scorers=scorers, max_staleness=staleness)
    run.ledger = tmp_path / "ledger.sqlite"
    run.run()
    assert run.trained == list(range(24)) and run.summary.drops == {}
    assert [scorer.restarts for scorer in scorers] == [0, 0]
    served = [index for generator in run.generators for index, _, _ in generator.served]
    assert (served.count(5), served.count(9), served.count(4)) == (2, 3, 1)
    assert run.column("driver/retries")[-1] == 3
    assert run.column("waste/tokens")[-1] == 3 * 16
    failures = "SELECT idx, count(*) FROM attempts WHERE ended = 'failed' GROUP BY idx"
    with contextlib.closing(sqlite3.connect(run.ledger)) as db:
        assert db.execute(failures).fetchall() == [(5, 1), (9, 2)]


def test_a_group_that_is_lost_each_time_is_dropped(world):
    run = world(scorers=[Loses("s0", {5: 99})], steps=4, attempts=2).run()
    assert run.trained == [*range(5), *range(6, 17)]
    assert list(run.summary.drops) == ["PayloadLost: s0: a payload is lost"]


def test_a_dead_scorer_is_restarted_and_nothing_is_lost(world):
    scorers = [scorer("s0", work={3: "die", 10: "die"})]
    run = world(scorers=scorers).run()
    assert run.trained == list(range(24))
    assert scorers[0].restarts == 2


def test_a_hanging_call_ends_with_its_worker(world):
    """The wedged call never returns; the worker's death gives its group to the other."""
    generators = [gen("g0", work={2: "hang", 3: "die"}), gen("g1")]
    run = world(generators=generators, steps=4, max_staleness=1).run()
    assert run.trained == list(range(16))


def test_a_role_is_needed(world):
    run = world()
    run.generators = []
    with pytest.raises(ValueError, match="at least one generator"):
        run.run()


def test_the_learner_goes_on_while_a_generator_restarts(world):
    generators = [FakeGenerator("g0", restart_seconds=fixed(500.0)), FakeGenerator("g1")]
    generators[0]._faults = Faults(load={2: "die"})
    run = world(generators=generators, steps=10, learner=FakeLearner(seconds=fixed(0.5))).run()
    assert run.summary.seconds < 100
