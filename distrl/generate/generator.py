"""The generator: a vLLM engine behind the `Generator` role, in one process.

Who waits for whom. `generate` begins and ends while the weights that were loaded last
have passed the canary; where others failed it meanwhile, the group is rolled out anew:
a sample of unproven weights never leaves.
`load_weights` waits for nobody: requests in flight are frozen, not drained, and go on
under the new weights with their cache computed anew; each token keeps the version
that sampled it. One lock owns pause and resume.

A request that takes too long is lost; an engine that has work for as long and gives nothing out is
stopped, and whoever waits for it gets WorkerDied (`watch.py`).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from distrl.config import SyncConfig
from distrl.data.tokenizer import load_tokenizer
from distrl.generate.engine import SOCKETS, EngineSpec, on_output, sampler_seed, start_engine
from distrl.generate.records import IncompleteOutput, to_rollout, token_logprobs
from distrl.generate.watch import Watch
from distrl.records import GroupInfo, Offer, Parcel, Prompt, Rollout, Weights
from distrl.roles import CanaryMismatch, EngineFailed, RoleError, WorkerDied
from distrl.sync.vllm_calls import arriving, in_memory, meeting

if TYPE_CHECKING:
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import RequestOutputCollector

    Queued = asyncio.Future[RequestOutputCollector]

T = TypeVar("T")

SHUTDOWN_S = 5.0
"""The engine's processes get this long to end of themselves and free their shared memory."""

LOOK_S = 0.5
"""Seconds between looks whether the engine is alive, while it is asked for something."""

PROBE_PRIORITY = -1
"""Before all samples (0): a sync must not last until the queue of prompts is empty."""


class Gate:
    """Collects the prompts of one lockstep batch."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self.waiting: dict[Queued, Prompt] = {}

    @property
    def full(self) -> bool:
        return len(self.waiting) == self.groups


class VLLMGenerator:
    """One engine. Use `await start()` once, in the loop that it will live in."""

    def __init__(self, name: str, spec: EngineSpec, sync: SyncConfig) -> None:
        self.name = name
        self.spec = spec
        self.sync = sync
        self.tokenizer = load_tokenizer(spec.model)
        self._engine: AsyncLLM | None = None
        self._ids = itertools.count()
        self._updating = asyncio.Lock()
        self._proven = asyncio.Event()
        self._bad_loads = 0
        self._gate: Gate | None = None
        self._releasing: asyncio.Task[None] | None = None
        self._loads = 0
        self._watching: asyncio.Task[None] | None = None
        self._collectors: set[RequestOutputCollector] = set()
        self._met: tuple[str, int] | None = None
        self._sockets = Path(tempfile.mkdtemp(prefix=f"{SOCKETS}{os.getpid()}-"))

    async def start(self) -> None:
        """Start the engine; it holds the checkpoint's weights, as version 0."""
        await self._launch()
        self._proven.set()

    async def _launch(self) -> None:
        self._sockets.mkdir(exist_ok=True)
        try:
            self._engine = start_engine(self.spec, self._sockets, self.sync.transport)
        except Exception as error:  # vLLM's own say "see above", which is in the log
            raise EngineFailed(f"{self.name}: the engine did not start: {error}") from error
        watch = Watch(self.spec.config.request_timeout_s, self._has_work)
        on_output(self._engine, watch.heard)
        self._watching = asyncio.create_task(self._give_up_after(watch))
        await self._engine.update_weight_version("0")

    def _has_work(self) -> bool:
        """Whether the engine should be giving out tokens; a load has a deadline of its own."""
        releasing = self._releasing is not None and not self._releasing.done()
        return not self._loads and (releasing or bool(self._collectors))

    async def _give_up_after(self, watch: Watch) -> None:
        await watch.silence()
        await self._stop(
            "the engine had work, and gave out no token in "
            f"generate.request_timeout_s={watch.limit_s:g} s of it; "
            "its process or its GPU hangs"
        )

    @property
    def engine(self) -> AsyncLLM:
        if self._engine is None:
            raise WorkerDied(f"{self.name}: no engine is running")
        return self._engine

    # -- rollouts -----------------------------------------------------------------

    async def generate(self, prompt: Prompt) -> Parcel[GroupInfo]:
        """Roll out one group. Raises RoleError: the group was lost."""
        began = time.monotonic()
        while True:
            await self._proven.wait()
            bad_loads = self._bad_loads
            rollout = await self._roll(prompt)
            await self._proven.wait()
            if self._bad_loads == bad_loads:
                info = GroupInfo.of(rollout, time.monotonic() - began, self.spec.seed)
                return Parcel(info=info, payload=rollout)

    async def hold(self, groups: int) -> None:
        """Keep new prompts back until `groups` of them wait, then start all at once."""
        self._gate = Gate(groups)

    async def _roll(self, prompt: Prompt) -> Rollout:
        try:
            async with asyncio.timeout(self.spec.config.request_timeout_s):
                collector = await self._enqueue(prompt)
                output = await self._finished(collector)
            return to_rollout(output, prompt, self.name, self._decode)
        except TimeoutError:
            raise RoleError(
                f"{self.name}: prompt {prompt.prompt_id!r} took longer than "
                f"generate.request_timeout_s={self.spec.config.request_timeout_s:g}"
            ) from None
        except IncompleteOutput as error:
            raise RoleError(f"{self.name}: {error}") from error

    async def _enqueue(self, prompt: Prompt) -> RequestOutputCollector:
        gate = self._gate
        if gate is None:
            return await self._alive(self._add(prompt))
        queued: Queued = asyncio.Future()
        gate.waiting[queued] = prompt
        if gate.full:
            self._gate = None
            # A task of its own: whoever gives up waiting must not leave the engine paused.
            self._releasing = asyncio.create_task(self._release(gate))
        try:
            return await self._alive(queued)
        except asyncio.CancelledError:
            gate.waiting.pop(queued, None)
            raise

    async def _release(self, gate: Gate) -> None:
        """Start a whole batch; each who waits gets its request, or the reason why not."""
        try:
            outcomes = await self._or_death(self._add_all(gate))
        except Exception as error:  # whatever it was: nobody may wait for ever
            outcomes = dict.fromkeys(gate.waiting, error)
        for queued, outcome in outcomes.items():
            if isinstance(outcome, Exception):
                if not queued.done():
                    queued.set_exception(outcome)
            elif queued.done():
                await self.engine.abort(outcome.request_id, internal=True)
            else:
                queued.set_result(outcome)

    async def _add_all(self, gate: Gate) -> dict[Queued, RequestOutputCollector | Exception]:
        """Queue a whole batch while the engine stands still, then let it run.

        Sorted, so that the order of arrival is no matter. The question whether the
        engine is paused travels behind the requests in the same queue: its answer
        proves that all of them have arrived.
        """
        outcomes: dict[Queued, RequestOutputCollector | Exception] = {}
        ordered = sorted(gate.waiting.items(), key=lambda entry: entry[1].index)
        async with self._updating:
            await self.engine.pause_generation(mode="keep", clear_cache=False)
            try:
                for queued, prompt in ordered:
                    try:
                        outcomes[queued] = await self._add(prompt)
                    except RoleError as error:
                        outcomes[queued] = error
                await self.engine.is_paused()
            finally:
                await self.engine.resume_generation()
        return outcomes

    async def _add(self, prompt: Prompt) -> RequestOutputCollector:
        from vllm.exceptions import VLLMValidationError

        try:
            return await self.engine.add_request(
                f"{self.name}-{next(self._ids)}",
                {"prompt_token_ids": prompt.token_ids.tolist()},
                self._sampling(),
            )
        except VLLMValidationError as error:
            raise RoleError(
                f"{self.name}: prompt {prompt.prompt_id!r} is refused: {error}"
            ) from error

    def _sampling(self) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        config = self.spec.config
        return SamplingParams(
            n=config.samples_per_prompt,
            temperature=config.temperature,
            max_tokens=config.max_new_tokens,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            watermarking=False,
        )

    async def _finished(self, collector: RequestOutputCollector) -> RequestOutput:
        """The final output of a request; aborts it where nobody waits any more."""
        self._collectors.add(collector)
        try:
            while True:
                output: Any = await self._alive(_next(collector))
                if output.finished:
                    return output
        except (asyncio.CancelledError, TimeoutError):
            await self.engine.abort(collector.request_id, internal=True)
            raise
        finally:
            self._collectors.discard(collector)

    async def _alive(self, call: Awaitable[T]) -> T:
        """Await an engine call; a dead engine becomes WorkerDied."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await call
        except EngineDeadError as error:
            raise WorkerDied(f"{self.name}: the engine died: {error}") from error

    async def _or_death(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` comes to, or WorkerDied once the engine's process is gone: what was asked of
        it but requests, vLLM leaves without an answer then."""
        working = asyncio.ensure_future(work)
        try:
            while not working.done():
                await asyncio.wait({working}, timeout=LOOK_S)
                if not working.done() and self.engine.errored:
                    raise WorkerDied(f"{self.name}: the engine died")
            return working.result()
        finally:
            working.cancel()

    def _decode(self, ids: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    # -- weights ------------------------------------------------------------------

    async def load_weights(self, weights: Weights, offer: Offer | None = None) -> None:
        """Take on `weights` with requests in flight, and prove it by the canary.

        offer: of the learner, which is sending them at the same time; None: they lie in memory.
        Raises CanaryMismatch (load again, or replace this generator), or WorkerDied
        where the transfer failed or was late: the engine may hold half of each version then,
        and is stopped.
        """
        limit = asyncio.timeout(self.sync.timeout_s)
        self._loads += 1
        try:
            async with limit, self._updating:
                await self._load(weights, offer)
        except TimeoutError:
            await self.close()
            if not limit.expired():
                raise
            raise WorkerDied(
                f"{self.name}: version {weights.version} was not loaded within "
                f"sync.timeout_s={self.sync.timeout_s:g}; if weights of this size take longer, "
                "raise it"
            ) from None
        except WorkerDied:
            await self.close()
            raise
        finally:
            self._loads -= 1

    async def _load(self, weights: Weights, offer: Offer | None) -> None:
        """Transfer, then the canary. Raises CanaryMismatch; its weights stay unproven then."""
        self._proven.clear()
        await self._or_death(self._alive(self._transfer(weights, offer)))
        gap = await self._alive(self._canary_gap(weights))
        if not gap <= self.sync.canary_tolerance:
            self._bad_loads += 1
            raise CanaryMismatch(
                f"{self.name}: after loading version {weights.version} its log-probabilities "
                f"differ by {gap:.3g} nats from the learner's (allowed: "
                f"sync.canary_tolerance={self.sync.canary_tolerance:g})"
            )
        self._proven.set()

    async def _transfer(self, weights: Weights, offer: Offer | None = None) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        update = in_memory(weights) if offer is None else arriving(offer)
        await self.engine.pause_generation(mode="keep", clear_cache=True)
        try:
            if offer is not None:
                await self._meet(offer)
            await self.engine.start_weight_update()
            await self.engine.update_weights(WeightTransferUpdateRequest(update_info=update))
            await self.engine.finish_weight_update(weight_version=str(weights.version))
        except Exception as error:  # vLLM hands on its workers' errors as plain Exception
            raise WorkerDied(f"{self.name}: weight transfer failed: {error}") from error
        await self.engine.resume_generation()

    async def _meet(self, offer: Offer) -> None:
        """Have the engine's workers and the learner make a group, unless there is one."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        place = (offer.host, offer.port)
        if place != self._met:
            request = WeightTransferInitRequest(init_info=meeting(offer))
            await self.engine.init_weight_transfer_engine(request)
            self._met = place

    async def _canary_gap(self, weights: Weights) -> float:
        """Largest difference (nats) between engine and learner on the probe."""
        mine = await self.score_tokens(weights.probe_ids)
        return float(np.abs(mine - weights.probe_logprobs).max())

    async def score_tokens(self, token_ids: np.ndarray) -> np.ndarray:
        """[K-1] float32: log p(token_ids[1:]) under the engine's present weights."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            watermarking=False,
        )
        collector = await self.engine.add_request(
            f"{self.name}-probe-{next(self._ids)}",
            {"prompt_token_ids": token_ids.tolist()},
            params,
            priority=PROBE_PRIORITY,
        )
        output = await self._finished(collector)
        flat = cast("FlatLogprobs", output.prompt_logprobs)  # flat_logprobs asks for it
        return token_logprobs(flat[1:], token_ids[1:])

    # -- life ---------------------------------------------------------------------

    async def restart(self) -> None:
        """Start the engine anew in this process, with other random numbers. No rollout leaves
        before `load_weights`."""
        await self.close()
        self.spec = replace(self.spec, seed=sampler_seed(self.spec.seed, 0, restarts=1))
        self._proven.clear()
        await self._launch()

    async def close(self) -> None:
        """Stop the engine and its processes; who waits gets WorkerDied. May be called twice."""
        await self._stop("its engine was stopped")

    async def _stop(self, why: str) -> None:
        watching, self._watching = self._watching, None
        if watching is not None and watching is not asyncio.current_task():
            watching.cancel()
        engine, self._engine = self._engine, None
        self._met = None
        gone = WorkerDied(f"{self.name}: {why}")
        for collector in self._collectors:
            collector.put(gone)
        gate, self._gate = self._gate, None
        for queued in gate.waiting if gate else ():
            if not queued.done():
                queued.set_exception(gone)
        self._bad_loads += 1
        self._proven.set()
        if engine is not None:
            await asyncio.to_thread(engine.shutdown, SHUTDOWN_S)
        shutil.rmtree(self._sockets, ignore_errors=True)


async def _next(collector: RequestOutputCollector) -> Any:
    return collector.get_nowait() or await collector.get()
