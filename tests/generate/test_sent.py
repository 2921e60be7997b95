"""Weights that a learner sends to one real engine over gloo, and what becomes of a failure.

The tests run in order, on one engine; the last ones break it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio

from distrl.actors.sending import send
from distrl.actors.workers import failure_as_role_error
from distrl.config import SyncConfig
from distrl.generate.generator import VLLMGenerator
from distrl.records import Offer, Receiver, Rollout, Weights
from distrl.roles import CanaryMismatch, RoleError, WorkerDied
from distrl.sync.collective import Switchboard

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="module"),
]

TOLERANCE = 1e-4
ADAPTERS = 4


class Learner:
    """A learner's half of a sync, in this process and without Ray."""

    def __init__(self) -> None:
        self.board = Switchboard()
        self.offers: list[Offer] = []

    async def offer(self, weights: Weights, receiver: Receiver) -> Offer:
        with failure_as_role_error():
            self.offers.append(self.board.offer(weights, receiver, "127.0.0.1"))
        return self.offers[-1]

    async def send(self, name: str) -> None:
        with failure_as_role_error():
            await asyncio.to_thread(self.board.send, name)

    def hang_up(self, name: str) -> None:
        self.board.hang_up(name)


@pytest.fixture(scope="module")
def learner():
    learner = Learner()
    yield learner
    learner.board.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def receiving(engine_spec) -> AsyncIterator[VLLMGenerator]:
    sync = SyncConfig(transport="gloo", timeout_s=20)
    generator = VLLMGenerator("g0", engine_spec, sync)
    await generator.start()
    yield generator
    await generator.close()


async def load(engine: VLLMGenerator, learner: Learner, weights: Weights, start: int = 1) -> None:
    receiver = Receiver(
        name=engine.name, start=start, workers=1, near=True, timeout_s=engine.sync.timeout_s
    )
    weights = replace(weights, transport="gloo")
    await send(weights, learner, receiver, partial(engine.load_weights, weights))


async def roll(engine: VLLMGenerator, policies: Any, index: int) -> Rollout:
    return (await engine.generate(policies.prompt(index))).payload


def versions(rollout: Rollout) -> set[int]:
    return {span.version for sample in rollout.samples for span in sample.spans}


async def test_an_engine_starts_from_an_export_with_merged_adapters(receiving, exported):
    gap = np.abs(await receiving.score_tokens(exported.probe_ids) - exported.probe_logprobs).max()
    print(f"largest gap {gap:.2g} nats")
    assert gap < TOLERANCE


async def test_weights_arrive_with_requests_in_flight(receiving, learner, policies):
    """Every token is of the version that it is stamped with, and the group is made once."""
    rollouts, mixed = [], []
    for pause_s in (0.01, 0.03, 0.1, 0.3):  # how long they are under way, engines know best
        await load(receiving, learner, policies.publish(1))
        rolling = [asyncio.create_task(receiving.generate(policies.prompt(i))) for i in range(16)]
        for version in (2, 3):
            await asyncio.sleep(pause_s)
            began = time.monotonic()
            await load(receiving, learner, policies.publish(version))
            print(f"version {version} sent and proved in {time.monotonic() - began:.3f} s")
        rollouts += [(await task).payload for task in rolling]
        mixed = [s for r in rollouts for s in r.samples if len(s.spans) > 1]
        if len(mixed) >= 8:
            break
    gap = max(policies.gap(rollout) for rollout in rollouts)
    print(f"{len(mixed)} samples are of two versions or more; largest gap {gap:.2g} nats")
    assert len(mixed) >= 8 and gap < TOLERANCE
    assert len({(offer.host, offer.port) for offer in learner.offers}) == 1


async def test_an_older_version_can_still_be_sent(receiving, learner, policies):
    older, newer = policies.publish(4), policies.publish(5)
    for weights in (newer, older):
        await load(receiving, learner, weights)
        assert versions(await roll(receiving, policies, 1)) == {weights.version}


async def test_a_tied_head_that_is_not_sent_is_found_and_sending_again_heals(
    receiving, learner, policies
):
    with pytest.raises(CanaryMismatch, match="differ by"):
        await load(receiving, learner, policies.publish_without_head(6))
    late = asyncio.create_task(receiving.generate(policies.prompt(2)))
    await asyncio.sleep(0.5)
    assert not late.done()
    await load(receiving, learner, policies.publish(6))
    assert versions((await late).payload) == {6}
    assert len({offer.port for offer in learner.offers}) == 1, "all arrived: the group is sound"


async def test_a_version_that_is_not_kept_costs_nothing(receiving, learner, policies):
    gone = policies.publish(7)
    for version in (8, 9):
        policies.publish(version)
    with pytest.raises(RoleError, match="version 7 any more") as refused:
        await load(receiving, learner, gone)
    assert not isinstance(refused.value, WorkerDied)
    assert versions(await roll(receiving, policies, 3)) == {6}


async def test_a_learner_that_sends_nothing_ends_the_engine_in_time(
    receiving, learner, policies, monkeypatch
):
    """The engine's process is inside a collective then; the generator must not hang with it."""
    monkeypatch.setattr(receiving, "sync", receiving.sync.model_copy(update={"timeout_s": 2}))
    weights = replace(policies.publish(10), transport="gloo")
    receiver = Receiver(name="g0", start=1, workers=1, near=True, timeout_s=20)
    offer = await learner.offer(weights, receiver)
    rolling = asyncio.create_task(receiving.generate(policies.prompt(4)))
    began = time.monotonic()
    async with asyncio.timeout(60):
        with pytest.raises(WorkerDied, match=r"version 10 was not loaded within sync.timeout_s=2"):
            await receiving.load_weights(weights, offer)
    took_s = time.monotonic() - began
    print(f"given up after {took_s:.1f} s, the engine's end included")
    assert took_s < 2 + 15
    with pytest.raises(WorkerDied):
        await rolling
    learner.hang_up("g0")


async def test_a_restarted_generator_gets_a_group_of_its_own_and_catches_up(
    receiving, learner, policies
):
    before = learner.offers[-1]
    await receiving.restart()
    await load(receiving, learner, policies.publish(11), start=2)
    assert learner.offers[-1].port != before.port
    rollout = await roll(receiving, policies, 5)
    assert versions(rollout) == {11} and policies.gap(rollout) < TOLERANCE


async def test_an_engine_that_dies_on_the_way_frees_the_learner(receiving, learner, policies):
    """It stands still in the middle of a load, and is killed: the deadline is far off."""
    processes = [p for p in psutil.Process().children(recursive=True) if "VLLM" in p.name()]
    assert processes
    for process in processes:
        process.suspend()
    loading = asyncio.create_task(load(receiving, learner, policies.publish(12), start=2))
    await asyncio.sleep(0.5)
    assert not loading.done()
    for process in processes:
        process.kill()
    began = time.monotonic()
    with pytest.raises(WorkerDied):
        await loading
    assert time.monotonic() - began < 15
    assert learner.board._lines["g0"].dead
