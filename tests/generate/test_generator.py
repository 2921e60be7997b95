"""One real engine: what it says of its samples is true, whatever its weights went through.

The tests run in order, on one engine; the last ones break it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import AsyncIterator

import numpy as np
import psutil
import pytest
import pytest_asyncio

from distrl.generate.generator import VLLMGenerator
from distrl.generate.records import IncompleteOutput
from distrl.records import Prompt, Rollout
from distrl.roles import CanaryMismatch, RoleError, WorkerDied

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="module"),
]

TOLERANCE = 1e-4


async def roll(engine: VLLMGenerator, prompts: list[Prompt]) -> list[Rollout]:
    parcels = await asyncio.gather(*(engine.generate(p) for p in prompts))
    return [parcel.payload for parcel in parcels]


def versions(rollout: Rollout) -> set[int]:
    return {span.version for sample in rollout.samples for span in sample.spans}


async def test_an_engine_starts_from_what_a_learner_exports(engine, exported):
    """No weights are sent: what it computes with are the files of `policy/`."""
    gap = np.abs(await engine.score_tokens(exported.probe_ids) - exported.probe_logprobs).max()
    print(f"largest gap {gap:.2g} nats")
    assert gap < TOLERANCE


async def test_log_probabilities_at_a_temperature_equal_those_of_transformers(engine, policies):
    rollouts = await roll(engine, [policies.prompt(i, tokens=3 + i) for i in range(8)])
    gap = max(policies.gap(rollout) for rollout in rollouts)
    print(f"largest gap {gap:.2g} nats")
    assert gap < TOLERANCE
    assert all(versions(rollout) == {0} for rollout in rollouts)


async def test_a_group_is_n_different_samples_that_end_as_they_say(engine, policies):
    parcels = await asyncio.gather(*(engine.generate(policies.prompt(i)) for i in range(8)))
    reasons = set()
    for index, parcel in enumerate(parcels):
        rollout, info = parcel.payload, parcel.info
        assert len(rollout.samples) == 4
        assert len({sample.token_ids.tobytes() for sample in rollout.samples}) == 4
        assert (info.index, info.generator, info.prompt_id) == (index, "g0", f"p{index}")
        assert info.lengths == tuple(len(sample.token_ids) for sample in rollout.samples)
        assert info.seconds > 0
        for sample in rollout.samples:
            reasons.add(sample.finish_reason)
            eos = sample.token_ids == engine.tokenizer.eos_token_id
            assert not eos[:-1].any(), "nothing follows an end"
            assert eos[-1] == (sample.finish_reason == "stop"), "the end belongs to the response"
            assert len(sample.token_ids) == 96 or sample.finish_reason == "stop"
            assert "<eos>" not in sample.text
    assert reasons == {"stop", "length"}


async def test_requests_under_way_go_on_under_new_weights(engine, policies):
    """Each token has the log-probability of the version that it is stamped with, given the
    whole prefix: so the cache of the tokens before was computed anew."""
    rollouts, mixed = [], []
    for pause_s in (0.01, 0.03, 0.1, 0.3):  # how long they are under way, engines know best
        await engine.load_weights(policies.publish(1))
        rolling = [asyncio.create_task(engine.generate(policies.prompt(i))) for i in range(16)]
        for version in (2, 3, 4):
            await asyncio.sleep(pause_s)
            await engine.load_weights(policies.publish(version))
        rollouts += [(await task).payload for task in rolling]
        mixed = [s for r in rollouts for s in r.samples if len(s.spans) > 1]
        if len(mixed) >= 8:
            break
    gap = max(policies.gap(rollout) for rollout in rollouts)
    print(f"{len(mixed)} samples are of two versions or more; largest gap {gap:.2g} nats")
    assert len(mixed) >= 8
    assert gap < TOLERANCE
    assert all(list(s.versions()) == sorted(s.versions()) for r in rollouts for s in r.samples)
    assert policies.gap((await roll(engine, [policies.prompt(99)]))[0]) < TOLERANCE


async def test_the_prefix_cache_never_serves_old_weights(engine, policies, monkeypatch):
    """The prompt fills five blocks of 32; the second request finds them cached, unless the weights
    changed between."""
    long = policies.prompt(0, tokens=180)
    await engine.load_weights(policies.publish(5))
    before = (await roll(engine, [long]))[0]
    assert await cached_tokens(engine, long, monkeypatch) == 160
    await engine.load_weights(policies.publish(6))
    assert await cached_tokens(engine, long, monkeypatch) == 0
    after = (await roll(engine, [long]))[0]
    assert (versions(before), versions(after)) == ({5}, {6})
    assert policies.gap(before) < TOLERANCE and policies.gap(after) < TOLERANCE


async def test_what_an_engine_has_loaded_is_its_own(engine, policies):
    """Newer versions are written over the image that it was loaded from."""
    image = policies.publish(10)
    await engine.load_weights(image)
    assert policies.publish(11).locator != image.locator == policies.publish(12).locator
    rollout = (await roll(engine, [policies.prompt(1)]))[0]
    assert versions(rollout) == {10}
    assert policies.gap(rollout) < TOLERANCE


async def cached_tokens(engine: VLLMGenerator, prompt: Prompt, monkeypatch) -> int:
    """Of the first sample: the others of a group share its prompt rightly."""
    params = engine._sampling()
    params.n = 1
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_sampling", lambda: params)
        output = await engine._finished(await engine._add(prompt))
    assert output.num_cached_tokens is not None
    return output.num_cached_tokens


async def test_a_tied_head_left_behind_is_found_and_no_rollout_leaves(engine, policies):
    await engine.load_weights(policies.publish(0))
    early = asyncio.create_task(engine.generate(policies.prompt(1)))
    with pytest.raises(CanaryMismatch, match="differ by"):
        await engine.load_weights(policies.publish_without_head(7))
    late = asyncio.create_task(engine.generate(policies.prompt(2)))
    await asyncio.sleep(1.5)
    assert not late.done() and not early.done()
    await engine.load_weights(policies.publish(7))
    for rollout in [(await task).payload for task in (early, late)]:
        assert versions(rollout) == {7}
        assert policies.gap(rollout) < TOLERANCE


@pytest.mark.parametrize("wrong", [0.01, np.nan])
async def test_a_wrong_probe_is_a_mismatch_and_loading_again_heals(engine, policies, wrong):
    weights = policies.publish(8)
    expected = weights.probe_logprobs.copy()
    expected[3] += wrong
    with pytest.raises(CanaryMismatch):
        await engine.load_weights(dataclasses.replace(weights, probe_logprobs=expected))
    await engine.load_weights(weights)
    assert versions((await roll(engine, [policies.prompt(1)]))[0]) == {8}


async def test_the_canary_does_not_queue_behind_waiting_requests(engine, policies):
    """The engine decodes 32 sequences at once. With 256 in the queue, a sync must not last
    until the queue is empty."""
    rolling = [asyncio.create_task(engine.generate(policies.prompt(i))) for i in range(64)]
    await asyncio.sleep(0.2)
    await engine.load_weights(policies.publish(9))
    waiting = engine.engine.get_num_unfinished_requests()
    rollouts = [(await task).payload for task in rolling]
    print(f"{waiting} of 256 sequences were unfinished after the sync")
    assert waiting > 128
    assert max(policies.gap(rollout) for rollout in rollouts) < TOLERANCE


async def test_held_prompts_start_together(engine, policies):
    await engine.hold(3)
    waits = [asyncio.create_task(engine.generate(policies.prompt(2)))]
    gone = asyncio.create_task(engine.generate(policies.prompt(9)))
    await asyncio.sleep(0.1)
    gone.cancel()
    await asyncio.sleep(0.1)
    waits.append(asyncio.create_task(engine.generate(policies.prompt(0))))
    await asyncio.sleep(0.3)
    assert engine.engine.get_num_unfinished_requests() == 0, "two wait, not three"
    waits.append(asyncio.create_task(engine.generate(policies.prompt(1))))
    assert [parcel.info.index for parcel in await asyncio.gather(*waits)] == [2, 0, 1]
    assert (await roll(engine, [policies.prompt(4)]))[0].prompt.index == 4, "the gate stays open"


async def test_a_sample_that_vllm_breaks_off_is_a_lost_group(engine, policies, monkeypatch):
    """Which is tried again, and no end of the run."""

    def broken(*_):
        raise IncompleteOutput("finish_reason='abort' after 3 tokens")

    with monkeypatch.context() as patch:
        patch.setattr("distrl.generate.generator.to_rollout", broken)
        with pytest.raises(RoleError, match="'abort' after 3 tokens"):
            await engine.generate(policies.prompt(1))
    assert await engine.generate(policies.prompt(1))


async def test_a_prompt_that_is_too_long_is_lost_alone(engine, policies):
    await engine.hold(2)
    waits = [engine.generate(policies.prompt(0, tokens=400)), engine.generate(policies.prompt(1))]
    refused, rolled = await asyncio.gather(*waits, return_exceptions=True)
    assert isinstance(refused, RoleError) and not isinstance(refused, WorkerDied)
    assert "prompt 'p0' is refused" in str(refused) and "288 tokens" in str(refused)
    assert not isinstance(rolled, BaseException) and rolled.info.index == 1


@pytest_asyncio.fixture(loop_scope="module")
async def aborted(engine, monkeypatch) -> AsyncIterator[list[str]]:
    """The ids that are taken out of the engine's own process, which stands still: requests arrive
    there, and none ends by itself."""
    ids: list[str] = []
    core = engine.engine.engine_core
    abort = core.abort_requests_async

    async def spy(request_ids):
        ids.extend(request_ids)
        await abort(request_ids)

    monkeypatch.setattr(core, "abort_requests_async", spy)
    await engine.engine.pause_generation(mode="keep", clear_cache=False)
    yield ids
    await engine.engine.resume_generation()


async def test_a_request_that_takes_too_long_is_lost(engine, policies, aborted, monkeypatch):
    config = engine.spec.config.model_copy(update={"request_timeout_s": 3})
    monkeypatch.setattr(engine, "spec", dataclasses.replace(engine.spec, config=config))
    with pytest.raises(RoleError, match=r"'p3' took longer than .*request_timeout_s=3"):
        await engine.generate(policies.prompt(3))
    assert len(aborted) == 4
    assert engine.engine.get_num_unfinished_requests() == 0


async def test_a_request_whose_time_is_over_before_it_is_queued_is_lost(engine, policies):
    """Nothing has reached the engine yet, or something has: nothing of it is left there."""
    spec = engine.spec
    for seconds in (1e-6, 1e-3, 5e-3, 2e-2):
        config = spec.config.model_copy(update={"request_timeout_s": seconds})
        engine.spec = dataclasses.replace(spec, config=config)
        try:
            with pytest.raises(RoleError, match="'p3' took longer than"):
                await engine.generate(policies.prompt(3))
        finally:
            engine.spec = spec
        assert engine.engine.get_num_unfinished_requests() == 0


async def test_a_cancelled_call_aborts_its_request(engine, policies, aborted):
    rolling = asyncio.create_task(engine.generate(policies.prompt(3)))
    async with asyncio.timeout(30):
        while engine.engine.get_num_unfinished_requests() < 4:
            await asyncio.sleep(0.01)
    rolling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await rolling
    assert len(aborted) == 4
    assert engine.engine.get_num_unfinished_requests() == 0


async def test_the_engines_death_is_told_to_all_who_wait(engine, policies):
    rolling = [asyncio.create_task(engine.generate(policies.prompt(i))) for i in range(3)]
    await asyncio.sleep(0.1)
    children = psutil.Process().children()
    (core,) = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
    os.kill(core.pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        await all_died(rolling)
        with pytest.raises(WorkerDied):
            await engine.generate(policies.prompt(1))
        with pytest.raises(WorkerDied):
            await engine.load_weights(policies.publish(11))


async def test_an_engine_that_dies_in_a_load_is_missed_at_once(engine, policies, monkeypatch):
    """vLLM leaves what was asked of it, but requests, without an answer."""
    await engine.restart()
    await engine.load_weights(policies.publish(14))
    children = psutil.Process().children()
    (core,) = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
    update = engine.engine.update_weights

    async def and_die(request):
        core.suspend()
        asyncio.get_running_loop().call_later(0.5, core.kill)
        await update(request)

    monkeypatch.setattr(engine.engine, "update_weights", and_die)
    async with asyncio.timeout(30):
        with pytest.raises(WorkerDied, match="the engine died"):
            await engine.load_weights(policies.publish(15))


async def test_one_that_stands_still_is_stopped_and_one_that_works_on_is_not(engine, policies):
    """It is missed by its silence, before any request's own deadline."""
    spec = engine.spec
    config = spec.config.model_copy(update={"request_timeout_s": 3})
    engine.spec = dataclasses.replace(spec, config=config)
    await engine.restart()
    await engine.load_weights(policies.publish(16))
    engine.spec = dataclasses.replace(engine.spec, config=spec.config)
    until = asyncio.get_running_loop().time() + 5
    while asyncio.get_running_loop().time() < until:
        await roll(engine, [policies.prompt(1)])
    children = psutil.Process().children()
    (core,) = [child for child in children if "EngineCore" in " ".join(child.cmdline())]
    core.suspend()
    rolling = [asyncio.create_task(engine.generate(policies.prompt(i))) for i in range(3)]
    async with asyncio.timeout(30):
        with pytest.raises(WorkerDied, match=r"no token in generate.request_timeout_s=3 s"):
            await rolling[0]
        await all_died(rolling)
        with pytest.raises(WorkerDied, match="no engine is running"):
            await engine.generate(policies.prompt(1))


async def test_a_restarted_engine_serves_nothing_before_the_runs_weights(engine, policies):
    """It starts from the checkpoint, which is not what the learner has by now."""
    await engine.hold(5)
    held = asyncio.create_task(engine.generate(policies.prompt(0)))
    await asyncio.sleep(0.1)
    seed = engine.spec.seed
    await engine.restart()
    assert engine.spec.seed != seed, "its sampler does not draw the same again"
    await all_died([held])
    rolling = asyncio.create_task(engine.generate(policies.prompt(1)))
    await asyncio.sleep(1)
    assert not rolling.done()
    await engine.load_weights(policies.publish(12))
    rollout = (await rolling).payload
    assert versions(rollout) == {12} and policies.gap(rollout) < TOLERANCE


async def test_a_transfer_that_fails_is_the_end_of_the_engine(engine, policies):
    """It may hold half of each version; whoever waits hears of it at once."""
    rolling = [asyncio.create_task(engine.generate(policies.prompt(i))) for i in range(3)]
    await asyncio.sleep(0.1)
    weights = policies.publish(13)
    short = dataclasses.replace(weights, nbytes=weights.nbytes - 4)
    async with asyncio.timeout(30):
        with pytest.raises(WorkerDied, match=r"bytes of weights where \d+ were sent"):
            await engine.load_weights(short)
        await all_died(rolling)
    await engine.close()
    with pytest.raises(WorkerDied, match="no engine is running"):
        await engine.generate(policies.prompt(1))


async def all_died(rolling: list[asyncio.Task]) -> None:
    outcomes = await asyncio.gather(*rolling, return_exceptions=True)
    assert all(isinstance(outcome, WorkerDied) for outcome in outcomes), outcomes
