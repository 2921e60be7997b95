"""The scorer role: requests gather, the loop stays free, failures and deadlines are said."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import types
from collections.abc import Sequence

import numpy as np
import pytest

from distrl.config import OverlongConfig, ScoreConfig
from distrl.data.tokenizer import train_tokenizer
from distrl.records import (
    GroupInfo,
    Parcel,
    Prompt,
    Rollout,
    Sample,
    ScoredRollout,
    VersionSpan,
)
from distrl.roles import HeldUp, NeverScored, ScoreFailed, WorkerDied
from distrl.score import LocalScorer, RewardSum, RuleReward


class Slow:
    """Scores a group by its index, after waiting; notes the size of each batch."""

    name = "slow"

    def __init__(self, seconds=0.0, hang_on=None):
        self.seconds, self.hang_on, self.batches = seconds, hang_on, []
        self.release = threading.Event()
        self.threads = set()

    def scores(self, rollouts: Sequence[Rollout]) -> list[list[float] | ScoreFailed]:
        self.batches.append(len(rollouts))
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        if any(r.prompt.index == self.hang_on for r in rollouts):
            self.release.wait(10)
        return [[float(r.prompt.index)] * len(r.samples) for r in rollouts]


class Lengths:
    name = "lengths"

    def scores(self, rollouts: Sequence[Rollout]) -> list[list[float] | ScoreFailed]:
        return [[float(len(s.token_ids)) for s in r.samples] for r in rollouts]


def parcel(index=0, lengths=(2, 2)) -> Parcel[GroupInfo]:
    ids = np.array([5, 1], np.int32)
    samples = tuple(
        Sample(
            text="t",
            token_ids=ids[:n],
            logprobs=np.zeros(n, np.float32),
            spans=(VersionSpan(version=0, start=0, end=n),),
            finish_reason="stop",
        )
        for n in lengths
    )
    prompt = Prompt(
        index=index,
        epoch=0,
        prompt_id=f"p{index}",
        text="say",
        token_ids=ids,
        meta={"index": index},
    )
    rollout = Rollout(prompt=prompt, samples=samples, generator="g")
    return Parcel(info=GroupInfo.of(rollout, 0.5), payload=rollout)


def scorer(reward, timeout_s=5.0) -> LocalScorer:
    tokenizer = train_tokenizer(["a"], 280, 24)
    rewards = RewardSum([reward], {"slow": 1.0})
    return LocalScorer(ScoreConfig(timeout_s=timeout_s), tokenizer, "scorer-7", rewards=rewards)


async def test_requests_that_wait_share_the_next_batch_and_get_their_own_answers():
    reward = Slow(0.05)
    made = scorer(reward)
    out = await asyncio.gather(*(made.score(parcel(i)) for i in range(20)))
    assert [p.info.rewards for p in out] == [(float(i), float(i)) for i in range(20)]
    assert sum(reward.batches) == 20 and len(reward.batches) <= 3
    assert all(isinstance(p.payload, ScoredRollout) for p in out)
    assert out[3].info.group == parcel(3).info and out[3].info.seconds > 0
    later = await made.score(parcel(30))
    assert later.info.rewards == (30.0, 30.0), "it works on after an idle time"


@pytest.mark.parametrize("weight", [0.0, 0.75])
async def test_a_group_that_differs_by_the_penalty_of_length_alone_is_silent(weight):
    """A part without weight is a metric: that it differs, as lengths do, is no signal."""
    config = ScoreConfig(overlong=OverlongConfig(penalty=1.0, start=1, full=3))
    rewards = RewardSum(
        [Slow(), Lengths()], {"slow": 1.0, "lengths": weight}, overlong=config.overlong
    )
    made = LocalScorer(config, train_tokenizer(["a"], 280, 24), rewards=rewards)
    info = (await made.score(parcel(7, (1, 2)))).info
    assert info.parts["lengths"] == (1.0, 2.0) and info.parts["overlong"] == (0.0, -0.5)
    assert info.merits == (7.0 + weight, 7.0 + 2 * weight)
    assert info.silent == (weight == 0.0)
    plain = await scorer(Slow()).score(parcel(7, (1, 2)))
    assert plain.info.silent and plain.info.merits == (), "nothing is taken off there"


async def test_the_event_loop_stays_free_while_a_batch_is_scored():
    reward = Slow(0.3)
    task = asyncio.create_task(scorer(reward).score(parcel()))
    ticks = 0
    while not task.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > 5 and threading.get_ident() not in reward.threads


async def test_a_failure_is_raised_to_the_one_who_asked():
    class Half:
        name = "slow"

        def scores(self, rollouts):
            odd = ScoreFailed("odd ones fail")
            return [odd if r.prompt.index % 2 else [1.0, 1.0] for r in rollouts]

    made = scorer(Half())
    out = await asyncio.gather(*(made.score(parcel(i)) for i in range(4)), return_exceptions=True)
    assert [isinstance(o, ScoreFailed) for o in out] == [False, True, False, True]


async def test_an_error_nobody_foresaw_reaches_every_waiting_request():
    class Broken:
        name = "slow"

        def scores(self, rollouts):
            raise MemoryError("no room")

    made = scorer(Broken())
    for _ in range(2):
        with pytest.raises(ScoreFailed, match="scorer-7: MemoryError: no room"):
            await made.score(parcel())


async def test_the_deadline_is_kept_and_a_restart_goes_on_beside_the_hanging_thread():
    reward = Slow(hang_on=1)
    made = scorer(reward, timeout_s=0.3)
    with pytest.raises(ScoreFailed, match=r"scorer-7 gave no score for prompt 'p1' within 0\.3 s"):
        await made.score(parcel(1))
    await made.restart()
    assert (await made.score(parcel(2))).info.rewards == (2.0, 2.0)
    reward.release.set()


class OneByOne(Slow):
    """As a function of text; the groups before the one that it hangs at take their time."""

    def scores(self, rollouts):
        out = []
        for rollout in rollouts:
            if rollout.prompt.index == self.hang_on:
                self.release.wait(10)
            time.sleep(self.seconds)
            out.append([float(rollout.prompt.index)] * len(rollout.samples))
        return out


async def told_in_order(made, indices):
    """(index, error or None) as each was told."""
    told = []

    async def ask(index):
        try:
            await made.score(parcel(index))
        except WorkerDied as error:
            told.append((index, type(error)))
        except ScoreFailed as error:
            told.append((index, type(error)))
        else:
            told.append((index, None))

    await asyncio.gather(*(ask(i) for i in indices))
    return told


async def test_a_group_that_hangs_is_told_first_and_the_others_are_to_be_scored_elsewhere():
    """Else the end of the scorer, which comes of the others, would take its answer along."""
    reward = OneByOne(hang_on=2)
    made = scorer(reward, timeout_s=0.5)
    asked = asyncio.create_task(told_in_order(made, range(5)))
    await asyncio.sleep(0.2)
    late = asyncio.create_task(told_in_order(made, [7]))
    first, *others = await asked
    assert first == (2, NeverScored)
    assert sorted(others) == [(i, HeldUp) for i in (0, 1, 3, 4)]
    assert await late == [(7, HeldUp)], "who waits behind them need not wait so long"
    with pytest.raises(HeldUp, match="scorer-7: the reward of prompt 'p2' hangs"):
        await made.score(parcel(8))
    await made.restart()
    assert (await made.score(parcel(3))).info.rewards == (3.0, 3.0)
    reward.release.set()


async def test_a_batch_that_is_slow_but_goes_on_fails_its_late_groups_alone():
    made = scorer(OneByOne(0.1), timeout_s=0.45)
    told = await told_in_order(made, range(8))
    assert {error for _, error in told} == {ScoreFailed}
    await asyncio.sleep(0.5)
    assert (await made.score(parcel(3))).info.rewards == (3.0, 3.0)


@pytest.fixture
def rule(monkeypatch):
    """`rule(function)`: a scorer with that function of a prompt's index as its rule."""

    def make(function, timeout_s=5.0, *models) -> LocalScorer:
        made = types.ModuleType("rules_here")
        vars(made)["rule"] = lambda *, prompt, response, meta: function(meta["index"])
        monkeypatch.setitem(sys.modules, "rules_here", made)
        rewards = RewardSum(
            [RuleReward("rule", "rules_here:rule"), *models], {"rule": 1.0, "slow": 1.0}
        )
        config = ScoreConfig(timeout_s=timeout_s)
        tokenizer = train_tokenizer(["a"], 280, 24)
        return LocalScorer(config, tokenizer, "scorer-7", rewards=rewards)

    return make


async def test_a_group_is_answered_as_soon_as_its_rules_are_done(rule):
    answered = threading.Event()
    model = Slow()
    made = rule(lambda index: index + (index == 1 and answered.wait(5)), 60.0, model)
    first, second = (asyncio.create_task(made.score(parcel(i))) for i in range(2))
    assert (await first).info.rewards == (0.0, 0.0)
    answered.set()
    assert (await second).info.rewards == (3.0, 3.0), "the first had its answer meanwhile"
    assert model.batches == [2], "reward models read both at once"
    assert (await second).info.parts == {"rule": (2.0, 2.0), "slow": (1.0, 1.0)}


async def test_a_group_is_not_charged_for_those_before_it(rule):
    def slow(index):
        time.sleep(0.3)
        return index

    told = await told_in_order(rule(slow, 2.5), range(6))
    assert told == [(i, None) for i in range(6)], "0.6 s each, 3.6 s the last"


async def test_a_rule_that_hangs_takes_no_score_from_the_groups_before_it(rule):
    release = threading.Event()
    made = rule(lambda index: index if index != 2 else release.wait(10), 1.0)
    told = await told_in_order(made, range(5))
    assert told[:3] == [(0, None), (1, None), (2, NeverScored)]
    assert sorted(told[3:]) == [(3, HeldUp), (4, HeldUp)]
    with pytest.raises(HeldUp, match="scorer-7: the reward of prompt 'p2' hangs"):
        await made.score(parcel(8))
    release.set()


async def test_a_batch_that_is_slow_first_and_hangs_then_is_found():
    reward = OneByOne(0.1, hang_on=6)
    made = scorer(reward, timeout_s=0.45)
    asked = asyncio.create_task(told_in_order(made, range(8)))
    await asyncio.sleep(0.55)
    assert await told_in_order(made, [9]) == [(9, HeldUp)]
    assert {error for _, error in await asked} == {ScoreFailed}
    reward.release.set()


async def test_reward_models_that_hang_with_several_groups_blame_none_of_them():
    reward = Slow(hang_on=3)
    made = scorer(reward, timeout_s=0.3)
    told = await told_in_order(made, range(4))
    assert {error for _, error in told} == {WorkerDied}
    reward.release.set()


async def test_closing_fails_what_waits_and_may_be_done_twice():
    reward = Slow(hang_on=0)
    made = scorer(reward)
    asked = [asyncio.create_task(made.score(parcel(i))) for i in range(3)]
    await asyncio.sleep(0.05)
    await made.close()
    await made.close()
    for outcome in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(outcome, ScoreFailed) and "was closed" in str(outcome)
    reward.release.set()


async def test_a_caller_that_goes_away_does_not_disturb_the_others():
    made = scorer(Slow(0.1))
    gone = asyncio.create_task(made.score(parcel(1)))
    stays = asyncio.create_task(made.score(parcel(2)))
    await asyncio.sleep(0.02)
    gone.cancel()
    assert (await stays).info.rewards == (2.0, 2.0)
