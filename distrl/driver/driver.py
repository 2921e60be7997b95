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
      Waits for B groups, for the learner, and before it publishes for the generators that are
      up to have loaded what it published last.
      Is unblocked by ROLL (a group lands or is dropped), by `stop`.

No loop waits for one that waits for it: FEED waits for LEARN only while B groups are under way,
and these need nothing from FEED (`admission.py` has the argument, and the proof of the bound).

Order at the start:  1 load the learner  2 publish  3 load every generator, canary checked
                     4 open admission.
Order of a step:     1 take B groups in order  2 check ages  3 learn  4 publish  5 load the
                     generators; those that fail leave service  6 release the B slots
                     7 metrics row  8 checkpoint.
Step k+1 begins while 5 to 7 of step k are under way; its 4 and the checkpoint of k wait for them.
A step that the learner skipped (non-finite) leaves out 4 and 5: no new weights came of it.
`stop` lets 3 end, leaves out 4 to 6, writes 7, cancels what is in flight, and then does 8.

FEED and ROLL are in `roll.py`, LEARN is in `learn.py`; this file wires them and ends them.

Beside them the LEDGER is written once a second, and always before a checkpoint is committed.

Any exception in any task cancels all others and leaves `run` as it is; nothing is left running.
What is in flight or in the buffer when a run ends is not part of the checkpoint: it is issued
again after a resume, from the cursor on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from distrl.config import DriverConfig
from distrl.driver.admission import Admission
from distrl.driver.auto import BoundController, FixedBound
from distrl.driver.buffer import OrderedBuffer
from distrl.driver.errors import DriverError, Stalled
from distrl.driver.fleet import Fleet
from distrl.driver.generators import Generators
from distrl.driver.learn import RESUME, LearnLoop
from distrl.driver.ledger import Ledger
from distrl.driver.ports import CheckpointStore, PromptSource, RolloutsHook
from distrl.driver.roll import Roller
from distrl.driver.staleness import StalenessRule
from distrl.driver.state import Progress, Start, Summary
from distrl.metrics.sinks import Sink
from distrl.roles import Generator, Learner, Scorer


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
        ledger: Ledger | None = None,
    ) -> None:
        """`clock` must run as the event loop's. `on_rollouts` is awaited after each step.
        `extra_state` goes into the state of every checkpoint (a W&B run id, say)."""
        start = start or Start()
        batch = config.prompts_per_step
        self._config = config
        self._start = start
        self._clock = clock
        self._tasks: asyncio.TaskGroup | None = None
        self._running = False
        self._progress = Progress.of(start, clock())
        self._buffer = OrderedBuffer(
            first=start.cursor,
            batch=batch,
            capacity=config.slots,
            max_bytes=int(config.buffer_mib * 2**20),
            window=config.window,
            ahead=start.ahead,
        )
        control = _bound_of(config, start.bound)
        self._admission = Admission(
            slots=config.slots_at(control.bound),
            wanted=max(0, config.steps - start.step) * batch,
            room=self._buffer.room,
        )
        self._ledger = ledger or Ledger()
        rule = StalenessRule(
            bound=control.bound,
            on_stale=config.on_stale if config.steps_ahead > config.largest_bound else None,
        )
        limits: dict[str, Any] = {
            "max_restarts": config.max_restarts,
            "tries": config.attempts,
            "note": self._ledger.event,
        }
        self._generators = Generators(generators, spawn=self._spawn, **limits)
        self._scorers: Fleet[Scorer] = Fleet("scorer", scorers, spawn=self._spawn, **limits)
        self._roller = Roller(
            source=source,
            admission=self._admission,
            buffer=self._buffer,
            generators=self._generators,
            scorers=self._scorers,
            progress=self._progress,
            spawn=self._spawn,
            clock=clock,
            ledger=self._ledger,
            rule=rule,
            samples_per_prompt=samples_per_prompt,
            skip_without_signal=config.skip_without_signal,
            lockstep=config.lockstep,
            issued=start.cursor,
            settled=frozenset(start.ahead),
        )
        self._learn = LearnLoop(
            config=config,
            learner=learner,
            roller=self._roller,
            buffer=self._buffer,
            admission=self._admission,
            progress=self._progress,
            sink=sink,
            checkpoints=checkpoints,
            ledger=self._ledger,
            rule=rule,
            control=control,
            start=start,
            clock=clock,
            on_rollouts=on_rollouts,
            extra_state=dict(extra_state or {}),
            spawn=self._spawn,
        )

    async def run(self) -> Summary:
        """Train to `config.steps` or until `stop`; a last checkpoint is written in both cases.

        Raises DriverError (see `errors`), LearnerFailed, or whatever a part raised that is not
        a RoleError. Cancelling it cancels all work.
        """
        began_s = self._progress.moved_s = self._clock()
        if self._progress.step < self._config.steps:
            await self._train()
        else:  # no step is left, but whoever exports it wants its weights
            await self._watched(self._learn.load())
        await self._watched(self._learn.save())
        await self._ledger.flush()
        return self._summary(self._clock() - began_s)

    async def _train(self) -> None:
        """All loops, until the last step is taken or one of them fails."""
        failure: Exception | None = None
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._running = True
                self._spawn(self._watch())
                self._spawn(self._ledger.keep())
                try:
                    await self._learn.open()
                    self._spawn(self._roller.feed())
                    await self._learn.run()
                except Exception as error:  # what fails next is its consequence
                    failure = error
                    raise
                finally:
                    self._generators.close()
                    self._scorers.close()
                raise _Finished
        except BaseExceptionGroup as group:
            if (error := failure or _first_error(group)) is not None:
                raise error from error.__cause__
        finally:
            self._running = False

    def stop(self) -> None:
        """End soon and cleanly: finish the learner step under way, write a checkpoint, return.

        May be called from a signal handler of the event loop, more than once, at any time.
        """
        self._learn.stopping = True
        self._admission.close()
        self._buffer.close()
        self._generators.close()
        self._scorers.close()

    def add_generator(self, generator: Generator) -> None:
        """Let a started generator join the running driver: it loads the weights, then gets work.
        Raises ValueError where one of its name is there, DriverError where no run is going on."""
        self._check_running()
        self._generators.join(generator)

    def remove_generator(self, name: str) -> None:
        """Let a generator leave: it ends what it has in flight, and may be closed then.
        Raises ValueError where it is not up, or the last one."""
        self._generators.leave(name)

    def add_scorer(self, scorer: Scorer) -> None:
        """Let a started scorer join the running driver. Raises ValueError likewise."""
        self._check_running()
        self._scorers.join(scorer)

    def remove_scorer(self, name: str) -> None:
        """Let a scorer leave. Raises ValueError likewise."""
        self._scorers.leave(name)

    def _check_running(self) -> None:
        if not self._running:
            raise DriverError("nobody can join: the run has not begun, or is over")

    async def _watch(self) -> None:
        """Raise Stalled when neither a group landed nor a step ended for too long."""
        limit = self._config.stall_timeout_s
        while (left := self._progress.moved_s + limit - self._clock()) > 0:
            await asyncio.sleep(left)
        raise Stalled(
            f"no group landed and no learner step ended for driver.stall_timeout_s={limit:g} s.\n"
            f"The learn loop is {self._progress.doing}; steps taken: {self._progress.step}.\n"
            f"Pending prompts:\n{self._roller.pending()}\n"
            f"Generators:\n{self._generators.describe()}\n"
            f"Scorers:\n{self._scorers.describe()}\n"
            f"Drops, the most frequent ones: {dict(self._learn.drops().most_common(10))}"
        )

    async def _watched(self, work: Coroutine[Any, Any, None]) -> None:
        """`work` of the learner, with nothing beside it. Raises Stalled likewise."""
        limit = self._config.stall_timeout_s
        watch = asyncio.timeout(limit)
        try:
            async with watch:
                await work
        except TimeoutError as error:
            if not watch.expired():
                raise
            raise Stalled(
                f"{self._progress.doing} took longer than driver.stall_timeout_s={limit:g} s; "
                f"{RESUME}"
            ) from error

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        assert self._tasks is not None
        return self._tasks.create_task(work)

    def _summary(self, seconds: float) -> Summary:
        progress = self._progress
        return Summary(
            step=progress.step,
            steps=progress.step - self._start.step,
            version=progress.version,
            stopped=self._learn.stopping,
            samples=progress.samples,
            tokens=progress.tokens,
            drops=self._learn.drops(),
            restarts=self._generators.restarts + self._scorers.restarts,
            seconds=seconds,
        )


def _bound_of(config: DriverConfig, before: int | None) -> BoundController | FixedBound:
    """What sets the staleness bound; one that is moved starts where it was before, or at 1."""
    if config.max_staleness == "auto":
        return BoundController(
            start=1 if before is None else before,
            ceiling=config.staleness_ceiling,
            target=config.ess_target,
        )
    return FixedBound(config.max_staleness)


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The first exception in `group` that is not the sign of a good end."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            error = _first_error(error)
        if error is not None and not isinstance(error, _Finished):
            return error
    return None
