"""The driver: three loops over the ring, and the promise that no token is too old.

    source ─▶ FEED ─▶ one ROLL task a group: generator ─▶ scorer ─▶ BUFFER ─▶ LEARN ─▶ learner
                ▲                                                               │
                └──────── slots, freed when the generators hold the weights ────┘

Who waits for whom:

FEED  consumes prompts of the source, in order; produces one roll task for each.
      Waits for a slot, and for room in the buffer.
      Is unblocked by LEARN (slots released, bytes taken), by ROLL (a drop frees its slot; a
      landing shows what a group weighs).
ROLL  consumes one prompt; produces one scored group in the buffer, or drops it with a reason
      after `driver.attempts` tries of either role.
      Waits for a usable generator and its group, then for a scorer and its scores.
      Is unblocked by the roles, by a worker's recovery, or by another worker taking over.
LEARN consumes the next B groups in order of issue; produces a learner step, its weights on the
      generators, its metrics row, a checkpoint where one is due.
      Waits for B groups, for the learner, for the generators that are up to load.
      Is unblocked by ROLL (a group lands or is dropped), by `stop`.

No loop waits for one that waits for it: FEED waits for LEARN only while B groups are under way,
and these need nothing from FEED (`admission.py` has the argument, and the proof of the bound).

Order at the start:  1 load the learner  2 publish  3 load every generator, canary checked
                     4 open admission.
Order of a step:     1 take B groups in order  2 check ages  3 learn  4 publish  5 load the
                     generators; those that fail leave service  6 release the B slots
                     7 metrics row  8 checkpoint.
A step that the learner skipped (non-finite) leaves out 4 and 5: no new weights came of it.
`stop` lets 3 end, leaves out 4 to 6, writes 7, cancels what is in flight, and then does 8.

Any exception in any task cancels all others and leaves `run` as it is; nothing is left running.
What is in flight or in the buffer when a run ends is not part of the checkpoint: it is issued
again after a resume, from the cursor on.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distrl.config import DriverConfig
from distrl.driver.admission import Admission
from distrl.driver.buffer import BufferClosed, Landed, OrderedBuffer
from distrl.driver.errors import DriverError, OutOfStep, Stalled
from distrl.driver.fleet import Fleet, GroupLost, Worker
from distrl.driver.generators import Generators
from distrl.driver.ports import CheckpointStore, PromptSource, RolloutsHook
from distrl.driver.row import Durations, Row, Stopwatch, batch_row, duration_row, staleness_row
from distrl.driver.staleness import check_ages
from distrl.driver.state import LEARNER_FOLDER, Progress, Start, Summary
from distrl.metrics.sinks import Sink
from distrl.records import GroupInfo, Parcel, Prompt, ScoredInfo, StepReport
from distrl.roles import Generator, Learner, Scorer


@dataclass(slots=True)
class Ticket:
    """A group under way: since when, and who has it."""

    prompt: Prompt
    admitted_s: float
    holder: str = "the driver"

    def held_by(self, name: str) -> None:
        self.holder = name


class _Finished(Exception):
    """Ends the task group when the learn loop is done."""


class Driver:
    """Runs one training run. Use once: `summary = await Driver(...).run()`.

    The roles belong to the caller, who closes them when `run` has returned or raised.
    """

    def __init__(
        self,
        config: DriverConfig,
        *,
        source: PromptSource,
        generators: Sequence[Generator],
        scorers: Sequence[Scorer],
        learner: Learner,
        sink: Sink,
        checkpoints: CheckpointStore,
        samples_per_prompt: int,
        start: Start | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_rollouts: RolloutsHook | None = None,
        extra_state: Mapping[str, Any] | None = None,
    ) -> None:
        """`clock` must run as the event loop's. `extra_state` goes into every checkpoint's state
        (a W&B run id, say). `on_rollouts` is awaited after each metrics row."""
        self._config = config
        self._source = source
        self._learner = learner
        self._sink = sink
        self._checkpoints = checkpoints
        self._samples_per_prompt = samples_per_prompt
        self._start = start or Start()
        self._clock = clock
        self._on_rollouts = on_rollouts
        self._extra_state = dict(extra_state or {})

        batch = config.prompts_per_step
        self._lockstep = config.max_staleness == 0
        self._progress = Progress.of(self._start)
        self._buffer = OrderedBuffer(
            first=self._start.cursor,
            batch=batch,
            capacity=(config.max_staleness + 1) * batch,
            max_bytes=int(config.buffer_mib * 2**20),
        )
        self._admission = Admission(
            prompts_per_step=batch,
            max_staleness=config.max_staleness,
            wanted=max(0, config.steps - self._start.step) * batch,
            room=self._buffer.room,
        )
        limits = {"max_restarts": config.max_restarts, "tries": config.attempts}
        self._generators = Generators(generators, spawn=self._spawn, **limits)
        self._scorers: Fleet[Scorer] = Fleet("scorer", scorers, spawn=self._spawn, **limits)
        # In lockstep a scorer sees one group at a time: what shares a forward pass with it
        # would otherwise depend on who finished first, and with it the last bits of the reward.
        self._turns = {id(role): asyncio.Lock() for role in scorers} if self._lockstep else {}

        self._tickets: dict[int, Ticket] = {}
        self._issued = self._start.cursor
        self._landed_tokens = 0
        self._stopping = False
        self._saved_step = self._start.step
        self._doing = "starting"
        self._progressed_s = clock()
        self._since_row = Stopwatch(clock)
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> Summary:
        """Train to `config.steps` or until `stop`; a last checkpoint is written in both cases.

        Raises DriverError (see `errors`), LearnerFailed, or whatever a part raised that is not
        a RoleError. Cancelling it cancels all work.
        """
        began_s = self._clock()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._spawn(self._watch())
                if self._progress.step < self._config.steps:
                    await self._open()
                    self._spawn(self._feed())
                    await self._learn()
                raise _Finished
        except BaseExceptionGroup as group:
            if (error := _first_error(group)) is not None:
                raise error from error.__cause__
        if self._progress.step > self._saved_step:
            await self._save()
        return self._summary(self._clock() - began_s)

    def stop(self) -> None:
        """End soon and cleanly: finish the learner step under way, write a checkpoint, return.

        May be called from a signal handler of the event loop, more than once, at any time.
        """
        self._stopping = True
        self._admission.close()
        self._buffer.close()
        self._generators.close()
        self._scorers.close()

    # -- start ---------------------------------------------------------------------------------

    async def _open(self) -> None:
        self._progressed_s = self._clock()
        start = self._start
        if start.checkpoint is not None:
            await self._learner.load(start.checkpoint / LEARNER_FOLDER)
        self._source.seek(start.cursor)
        await self._sync()
        self._doing = "waiting for groups"
        self._since_row.lap()

    # -- feed ----------------------------------------------------------------------------------

    async def _feed(self) -> None:
        while True:
            count = await self._admission.admit()
            prompts = [self._next_prompt() for _ in range(count)]
            firsts = await self._hold(count) if self._lockstep else [None] * count
            for prompt, first in zip(prompts, firsts, strict=True):
                ticket = Ticket(prompt, self._clock())
                self._tickets[prompt.index] = ticket
                self._spawn(self._roll(ticket, first))

    def _next_prompt(self) -> Prompt:
        prompt = self._source.next()
        if prompt.index != self._issued:
            raise OutOfStep(
                f"the prompt source gave index {prompt.index} where {self._issued} was due; "
                "after seek(n), next() must count on from n"
            )
        self._issued += 1
        return prompt

    async def _hold(self, count: int) -> list[Worker[Generator] | None]:
        """Lockstep: deal `count` prompts round, and tell each generator how many to wait for."""
        workers = self._generators.usable()[:count]
        if not workers:
            return [None] * count
        shares = Counter(place % len(workers) for place in range(count))
        for place, worker in enumerate(workers):
            await self._generators.hold(worker, shares[place])
        return [workers[place % len(workers)] for place in range(count)]

    # -- roll ----------------------------------------------------------------------------------

    async def _roll(self, ticket: Ticket, first: Worker[Generator] | None) -> None:
        """One group from prompt to buffer, or dropped: exactly one of the two."""
        index = ticket.prompt.index
        try:
            generated = await self._generators.do(
                lambda role: role.generate(ticket.prompt), holder=ticket.held_by, first=first
            )
            self._check_group(ticket.prompt, generated.info)
            scored = await self._scorers.do(
                lambda role: self._score(role, generated), holder=ticket.held_by
            )
        except GroupLost as lost:
            del self._tickets[index]
            self._buffer.drop(index, str(lost))
            self._admission.dropped()
            return
        del self._tickets[index]
        self._land(ticket, scored)

    async def _score(self, role: Scorer, group: Parcel[GroupInfo]) -> Parcel[ScoredInfo]:
        if not self._lockstep:
            return await role.score(group)
        async with self._turns[id(role)]:
            return await role.score(group)

    def _check_group(self, prompt: Prompt, info: GroupInfo) -> None:
        if info.index != prompt.index or len(info.lengths) != self._samples_per_prompt:
            raise DriverError(
                f"{info.generator} answered prompt {prompt.index} with group {info.index} of "
                f"{len(info.lengths)} samples; {self._samples_per_prompt} samples were due"
            )

    def _land(self, ticket: Ticket, scored: Parcel[ScoredInfo]) -> None:
        now = self._clock()
        self._progressed_s = now
        self._landed_tokens += sum(scored.info.group.lengths)
        self._buffer.put(
            Landed(
                parcel=scored,
                admitted_s=ticket.admitted_s,
                landed_s=now,
                landed_version=self._progress.version,
            )
        )
        self._admission.landed()

    # -- learn ---------------------------------------------------------------------------------

    async def _learn(self) -> None:
        while self._progress.step < self._config.steps and not self._stopping:
            watch = Stopwatch(self._clock)
            try:
                batch = await self._buffer.take(self._config.prompts_per_step)
            except BufferClosed:
                break
            self._admission.recheck()
            await self._step(batch, idle=watch.lap())

    async def _step(self, batch: list[Landed], idle: float) -> None:
        consumed_s = self._clock()
        ages = check_ages(batch, self._progress.version, self._config.max_staleness)
        watch = Stopwatch(self._clock)
        self._doing = f"in the learner's step {self._progress.step + 1}"
        report = await self._learner.learn([landed.parcel.payload for landed in batch])
        self._count(batch, report)
        learn = watch.lap()
        ahead = {
            "buffer/groups": self._buffer.groups,
            "buffer/mib": self._buffer.nbytes / 2**20,
            "driver/lead": (self._issued - self._buffer.cursor) / len(batch),
        }
        if not self._stopping:
            if not report.skipped:
                await self._sync()
            self._admission.released(len(batch))
        durations = Durations(step=self._since_row.lap(), idle=idle, learn=learn, sync=watch.lap())
        row = {
            **batch_row(batch, consumed_s),
            **staleness_row(batch, ages, self._config.max_staleness),
            **duration_row(durations),
            **self._driver_row(durations.step),
            **ahead,
            **report.metrics,
        }
        await self._after(batch, row)

    def _count(self, batch: list[Landed], report: StepReport) -> None:
        progress = self._progress
        due = (progress.step + 1, progress.version + (not report.skipped))
        if (report.step, report.version) != due:
            raise OutOfStep(
                f"the learner reports step {report.step} and version {report.version} "
                f"(skipped: {report.skipped}) where step {due[0]} and version {due[1]} were due"
            )
        progress.step, progress.version = due
        progress.samples += sum(len(landed.parcel.info.group.lengths) for landed in batch)
        progress.tokens += sum(sum(landed.parcel.info.group.lengths) for landed in batch)
        self._progressed_s = self._clock()

    async def _sync(self) -> None:
        """Publish, and load on every generator that is up."""
        self._doing = "publishing weights"
        weights = await self._learner.publish()
        if weights.version != self._progress.version:
            raise OutOfStep(
                f"the learner published version {weights.version} where "
                f"{self._progress.version} was due"
            )
        self._doing = f"loading version {weights.version} on the generators"
        await self._generators.load(weights)

    async def _after(self, batch: list[Landed], row: Row) -> None:
        """Metrics, tables, and the checkpoint where one is due."""
        step = self._progress.step
        self._sink.log(step, row)
        if self._on_rollouts is not None:
            self._doing = "showing rollouts"
            await self._on_rollouts(step, [landed.parcel.payload for landed in batch])
        if step % self._config.checkpoint_every == 0:
            await self._save()
        self._doing = "waiting for groups"

    async def _save(self) -> None:
        step = self._progress.step
        self._doing = f"writing the checkpoint of step {step}"
        folder = await asyncio.to_thread(self._checkpoints.begin, step)
        await self._learner.save(folder / LEARNER_FOLDER)
        state = self._progress.state(self._buffer.cursor, self._drops())
        await asyncio.to_thread(self._checkpoints.commit, step, {**self._extra_state, **state})
        self._saved_step = step

    def _driver_row(self, seconds: float) -> Row:
        """Counts of the driver; `seconds` have passed since the last row."""
        tokens, self._landed_tokens = self._landed_tokens, 0
        return {
            "rollout/tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
            "driver/in_flight": self._admission.in_flight,
            "driver/drops": self._drops().total(),
            "driver/retries": self._generators.retries + self._scorers.retries,
            "driver/restarts": self._generators.restarts + self._scorers.restarts,
            "driver/reloads": self._generators.reloads,
            "driver/generators": len(self._generators.usable()),
            "samples/total": self._progress.samples,
            "tokens/total": self._progress.tokens,
        }

    # -- watch and end -------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Raise Stalled when neither a group landed nor a step ended for too long."""
        limit = self._config.stall_timeout_s
        while (left := self._progressed_s + limit - self._clock()) > 0:
            await asyncio.sleep(left)
        raise Stalled(
            f"no group landed and no learner step ended for driver.stall_timeout_s={limit:g} s.\n"
            f"The learn loop is {self._doing}; steps taken: {self._progress.step}.\n"
            f"Pending prompts:\n{self._pending()}\nGenerators:\n{self._generators.describe()}\n"
            f"Scorers:\n{self._scorers.describe()}\nDrops: {dict(self._drops())}"
        )

    def _pending(self) -> str:
        now = self._clock()
        return (
            "\n".join(
                f"  {index} ({ticket.prompt.prompt_id}): with {ticket.holder}, "
                f"admitted {now - ticket.admitted_s:.0f} s ago"
                for index, ticket in sorted(self._tickets.items())
            )
            or "  none"
        )

    def _drops(self) -> Counter[str]:
        return Counter(self._start.drops) + self._buffer.drops

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._tasks is not None
        self._tasks.create_task(work)

    def _summary(self, seconds: float) -> Summary:
        progress = self._progress
        return Summary(
            step=progress.step,
            steps=progress.step - self._start.step,
            version=progress.version,
            stopped=self._stopping,
            samples=progress.samples,
            tokens=progress.tokens,
            drops=self._drops(),
            restarts=self._generators.restarts + self._scorers.restarts,
            seconds=seconds,
        )


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The first exception in `group` that is not the sign of a good end."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            error = _first_error(error)
        if error is not None and not isinstance(error, _Finished):
            return error
    return None
