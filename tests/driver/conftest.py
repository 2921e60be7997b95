"""One run of the real driver on a virtual clock with scripted roles."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from distrl.config import DriverConfig
from distrl.driver import Driver, Start, Summary
from distrl.driver.ledger import FileLedger, Ledger
from distrl.driver.ledger_file import LedgerFile
from distrl.metrics import ListSink
from distrl.sim import (
    CountingSource,
    FakeGenerator,
    FakeLearner,
    FakeScorer,
    MemoryCheckpoints,
    run_virtual,
)


@dataclass
class World:
    """The parts of a run, and what came of it."""

    generators: Sequence[FakeGenerator]
    scorers: Sequence[FakeScorer]
    learner: FakeLearner
    checkpoints: Any
    config: DriverConfig
    start: Start | None = None
    sink: ListSink = field(default_factory=ListSink)
    source: CountingSource = field(default_factory=CountingSource)
    summary: Summary | None = None
    driver: Driver | None = None
    hook: Any = None
    ledger: Path | None = None

    def run(
        self,
        during: Callable[[Driver], Awaitable[None]] | None = None,
        on_life: Callable[[asyncio.Task[Any]], None] = lambda task: None,
    ) -> World:
        """Run to the end on a virtual clock; `during` runs beside it, and `on_life` is given the
        task of the run itself. Fails on leftover tasks."""
        run_virtual(self._run(during, on_life))
        return self

    async def _run(
        self,
        during: Callable[[Driver], Awaitable[None]] | None,
        on_life: Callable[[asyncio.Task[Any]], None] = lambda task: None,
    ) -> None:
        clock = asyncio.get_running_loop().time
        ledger = self._ledger(clock)
        self.driver = Driver(
            self.config,
            source=self.source,
            generators=self.generators,
            scorers=self.scorers,
            learner=self.learner,
            sink=self.sink,
            checkpoints=self.checkpoints,
            samples_per_prompt=2,
            start=self.start,
            clock=clock,
            on_rollouts=self.hook,
            extra_state={"wandb_id": "abc"},
            ledger=ledger,
        )
        beside = asyncio.ensure_future(during(self.driver)) if during else None
        life = asyncio.ensure_future(self.driver.run())
        on_life(life)
        try:
            self.summary = await life
        finally:
            if not life.done():
                life.cancel()
            if beside is not None:
                await beside
            ledger.close()

    def _ledger(self, clock: Callable[[], float]) -> Ledger:
        if self.ledger is None:
            return Ledger()
        start = self.start or Start()
        return FileLedger(
            LedgerFile(self.ledger, step=start.step, cursor=start.cursor, ahead=start.ahead), clock
        )

    @property
    def trained(self) -> list[int]:
        """Indices in the order of training."""
        return [group.index for group in self.learner.trained]

    @property
    def ages(self) -> list[int]:
        """Age of the oldest token of each trained group, as the learner saw it."""
        return [group.age for group in self.learner.trained]

    def column(self, name: str) -> list[Any]:
        """One metric over the steps."""
        return [row[name] for _, row in self.sink.rows]


@pytest.fixture
def world(tmp_path: Path) -> Callable[..., World]:
    """`world(steps=…, generators=[…], …)`: a World; names of DriverConfig are its settings."""
    numbers = itertools.count()

    def make(
        *,
        generators: Sequence[FakeGenerator] | None = None,
        scorers: Sequence[FakeScorer] | None = None,
        learner: FakeLearner | None = None,
        start: Start | None = None,
        hook: Any = None,
        **settings: Any,
    ) -> World:
        settings = {"steps": 6, "prompts_per_step": 4, "checkpoint_every": 100, **settings}
        return World(
            generators=generators or [FakeGenerator("g0"), FakeGenerator("g1")],
            scorers=scorers or [FakeScorer("s0")],
            learner=learner or FakeLearner(),
            checkpoints=MemoryCheckpoints(tmp_path / f"{os.getpid()}-{next(numbers)}"),
            config=DriverConfig(**settings),
            start=start,
            hook=hook,
        )

    return make
