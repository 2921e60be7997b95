"""LEARN: batches in order of issue to the learner, its weights to the generators.

The order of operations is numbered at the head of `driver.py`. Invariant: a step's slots are
released only when every generator that may be given work holds the weights that came of it, and
after those of the step before. The learner does not wait for it: it takes the next batch while
the generators load, and waits before it publishes again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distrl.config import DriverConfig
from distrl.disk import writing
from distrl.driver.admission import Admission
from distrl.driver.auto import BoundController, FixedBound
from distrl.driver.buffer import BufferClosed, Landed, OrderedBuffer
from distrl.driver.errors import OutOfStep
from distrl.driver.fleet import Spawn
from distrl.driver.ledger import Ledger, Step
from distrl.driver.ports import CheckpointStore, RolloutsHook
from distrl.driver.roll import Roller
from distrl.driver.row import Row, Stopwatch, batch_row, staleness_row
from distrl.driver.staleness import StalenessRule, check_ages
from distrl.driver.state import LEARNER_FOLDER, Progress, Start
from distrl.metrics.sinks import Sink
from distrl.records import StepReport, Weights
from distrl.roles import Learner

logger = logging.getLogger(__name__)

RESUME = "go on with --resume: the checkpoints before it are whole"


@dataclass(kw_only=True)
class LearnLoop:
    """Takes, checks, learns, publishes; loads, releases and logs beside the next step.

    `spawn` starts a background task whose exception ends the run.
    """

    config: DriverConfig
    learner: Learner
    roller: Roller
    buffer: OrderedBuffer
    admission: Admission
    progress: Progress
    sink: Sink
    checkpoints: CheckpointStore
    ledger: Ledger
    rule: StalenessRule
    control: BoundController | FixedBound
    start: Start
    clock: Callable[[], float]
    on_rollouts: RolloutsHook | None
    extra_state: Mapping[str, Any]
    spawn: Spawn

    def __post_init__(self) -> None:
        self.stopping = False
        self._saved_step = self.start.step
        self._since_row = Stopwatch(self.clock)
        self._tokens_before = 0
        self._settling: asyncio.Task[None] | None = None

    def drops(self) -> Counter[str]:
        """Dropped groups below the cursor by reason, those before a resume included."""
        return Counter(self.start.drops) + self.buffer.drops

    async def load(self) -> None:
        """Bring the learner to where the run starts."""
        if self.start.checkpoint is not None:
            self.progress.doing = f"loading the learner from {self.start.checkpoint}"
            await self.learner.load(self.start.checkpoint / LEARNER_FOLDER)

    async def open(self) -> None:
        """Bring learner, source and generators to where the run starts."""
        await self.load()
        self.roller.source.seek(self.start.cursor)
        weights = await self._publish()
        self.progress.doing = f"loading version {weights.version} on the generators"
        await self.roller.generators.load(weights)
        self._since_row.lap()

    async def run(self) -> None:
        """Until all steps are taken, or `stopping`."""
        while self.progress.step < self.config.steps and not self.stopping:
            self.progress.doing = "waiting for groups"
            watch = Stopwatch(self.clock)
            try:
                batch = await self.buffer.take(self.config.prompts_per_step)
            except BufferClosed:
                break
            self.admission.recheck()
            await self._step(batch, idle_s=watch.lap())
        await self._settled()

    async def save(self) -> None:
        """Write a checkpoint of the last step, where there is none yet."""
        step = self.progress.step
        if step == self._saved_step:
            return
        await self._settled()  # a committed step has its row
        self.progress.doing = f"writing the checkpoint of step {step}"
        folder = await asyncio.to_thread(self.checkpoints.begin, step)
        with writing(f"the learner's part of the checkpoint of step {step}", folder, RESUME):
            await self.learner.save(folder / LEARNER_FOLDER)
        cursor = self.buffer.cursor
        state = self.progress.state(cursor, self.buffer.ahead, self.drops())
        state |= {"ledger": self.ledger.run_id, "bound": self.control.bound}
        await self.ledger.flush()
        await asyncio.to_thread(self.checkpoints.commit, step, {**self.extra_state, **state})
        self.ledger.committed(step, cursor)
        self._saved_step = step

    async def _step(self, batch: list[Landed], idle_s: float) -> None:
        consumed_s = self.clock()
        version = self.progress.version
        masked = check_ages(batch, version, self.rule)
        watch = Stopwatch(self.clock)
        self.progress.doing = f"in the learner's step {self.progress.step + 1}"
        report = await self.learner.learn(
            [landed.parcel.payload for landed in batch], oldest=self.rule.masks_below(version)
        )
        self._count(batch, masked, report)
        self.roller.version_changed()
        learn_s, ahead = watch.lap(), self._ahead_row()
        await self._settled()
        idle_s += watch.lap()
        weights = None if self.stopping or report.skipped else await self._publish()
        step_s, publish_s = self._since_row.lap(), watch.lap()
        row = {
            **batch_row(batch, consumed_s),
            **staleness_row(batch, masked, version, self._bound_of(batch)),
            # What is in none of the other three went to the hook of rollouts, or to a checkpoint.
            "time/step": step_s,
            "time/idle_learner": idle_s,
            "time/learn": learn_s,
            "time/publish": publish_s,
            **ahead,
            **self._driver_row(step_s),
            **report.metrics,
        }
        self._move_bound(report)
        self._settling = self.spawn(self._settle(weights, len(batch), row, publish_s))
        await self._after(batch)

    async def _settle(
        self, weights: Weights | None, groups: int, row: Row, publish_s: float
    ) -> None:
        """What a step leaves to do: its weights on the generators, its slots free, its row."""
        step, watch = self.progress.step, Stopwatch(self.clock)
        if weights is not None:
            await self.roller.generators.load(weights)
        if not self.stopping:
            self.admission.released(groups)
        self.sink.log(step, {**row, "time/sync": publish_s + watch.lap()})

    async def _settled(self) -> None:
        """Wait until nothing is left to do of the last step."""
        if self._settling is not None and not self._settling.done():
            version = self.progress.version
            self.progress.doing = f"waiting for the generators, which load version {version}"
            await self._settling

    def _count(self, batch: list[Landed], masked: list[int], report: StepReport) -> None:
        progress = self.progress
        due = (progress.step + 1, progress.version + (not report.skipped))
        if (report.step, report.version) != due:
            raise OutOfStep(
                f"the learner reports step {report.step} and version {report.version} "
                f"(skipped: {report.skipped}) where step {due[0]} and version {due[1]} were due"
            )
        self.ledger.trained(
            Step(
                number=due[0],
                version=progress.version,
                version_after=due[1],
                bound=self._bound_of(batch),
            ),
            [landed.index for landed in batch],
            masked,
        )
        progress.step, progress.version = due
        progress.samples += sum(len(landed.parcel.info.group.lengths) for landed in batch)
        progress.tokens += sum(sum(landed.parcel.info.group.lengths) for landed in batch)
        progress.moved_s = self.clock()

    def _bound_of(self, batch: list[Landed]) -> int:
        """The bound that a batch is held to: each group to the one it was admitted under."""
        return max(landed.bound for landed in batch)

    def _move_bound(self, report: StepReport) -> None:
        if report.skipped:  # its samples may have given no number at all
            return
        cause = self.control.update(report.metrics.get("ppo/ess", 1.0))
        if cause is not None:
            self.rule.bound = self.control.bound
            self.admission.resize(self.config.slots_at(self.control.bound))
            self.ledger.event("driver", "max_staleness", cause)
            logger.info("max_staleness %s", cause)

    async def _publish(self) -> Weights:
        self.progress.doing = "publishing weights"
        weights = await self.learner.publish()
        if weights.version != self.progress.version:
            raise OutOfStep(
                f"the learner published version {weights.version} where "
                f"{self.progress.version} was due"
            )
        return weights

    async def _after(self, batch: list[Landed]) -> None:
        step = self.progress.step
        if self.on_rollouts is not None:
            self.progress.doing = "showing rollouts"
            await self.on_rollouts(step, [landed.parcel.payload for landed in batch])
        if step % self.config.checkpoint_every == 0:
            await self.save()

    def _ahead_row(self) -> Row:
        """How far generation is ahead of the learner, at the end of the learner's step."""
        lead = (self.roller.issued - self.buffer.cursor) / self.config.prompts_per_step
        return {
            "buffer/groups": self.buffer.groups,
            "buffer/mib": self.buffer.nbytes / 2**20,
            "driver/lead": lead,
        }

    def _driver_row(self, seconds: float) -> Row:
        """Counts of the driver; `seconds` have passed since the last row."""
        tokens = self.roller.landed_tokens - self._tokens_before
        self._tokens_before = self.roller.landed_tokens
        generators, scorers = self.roller.generators, self.roller.scorers
        return {
            "rollout/tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
            "driver/in_flight": self.admission.in_flight,
            "driver/drops": self.drops().total(),
            "waste/tokens": self.roller.waste.tokens.total(),
            "waste/seconds": sum(self.roller.waste.seconds.values()),
            "driver/retries": generators.retries + scorers.retries,
            "driver/restarts": generators.restarts + scorers.restarts,
            "driver/reloads": generators.reloads,
            "driver/generators": len(generators.usable()),
            "samples/total": self.progress.samples,
            "tokens/total": self.progress.tokens,
        }
