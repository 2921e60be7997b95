"""Roles of a simulation: they take the time that a model of the real ones says.

They differ from `fakes.py`, whose calls last as a test's script says, in what decides how long
something takes: the engine's load, the scorer's batch, the learner's tokens.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distrl.records import GroupInfo, Parcel, Prompt, ScoredInfo, StepReport, Weights
from distrl.roles import RoleError
from distrl.sim.engine import Engine, Pace
from distrl.sim.fakes import FakeGroup, parcel_of, weights_of
from distrl.sim.process import Process, resolve
from distrl.sim.script import Faults, error_of

Lengths = Callable[[int], Sequence[int]]
"""From a prompt's index to the tokens of each of its samples."""


def drawn_lengths(pool: Sequence[int], samples: int) -> Lengths:
    """Each index draws its own samples' lengths from `pool`, whoever asks and whenever."""
    size = len(pool)

    def lengths(index: int) -> Sequence[int]:
        first = index * 7919 * samples
        return [pool[(first + place) % size] for place in range(samples)]

    return lengths


def log_normal_lengths(median: float, sigma: float, longest: int, seed: int) -> list[int]:
    """10,007 lengths from 1 to `longest`."""
    rng = np.random.default_rng(seed)
    drawn = np.exp(rng.normal(np.log(median), sigma, 10_007))
    return [int(length) for length in np.clip(np.rint(drawn), 1, longest)]


class SimGenerator:
    """A generator whose groups share an engine's pace.

    Attributes:
        busy_s: seconds in which it decoded something.
    """

    def __init__(
        self,
        name: str,
        pace: Pace,
        lengths: Lengths,
        *,
        load_s: float,
        restart_s: float,
        hang_s: float,
        faults: Faults,
    ) -> None:
        self.name = name
        self._pace, self._lengths, self._faults = pace, lengths, faults
        self._load_s, self._restart_s, self._hang_s = load_s, restart_s, hang_s
        self._process = Process(name)
        self._engine = Engine(pace)
        self._busy_before_s = 0.0
        self._gate: tuple[int, list[asyncio.Future[None]]] | None = None

    @property
    def busy_s(self) -> float:
        return self._busy_before_s + self._engine.busy_s

    async def generate(self, prompt: Prompt) -> Parcel[GroupInfo]:
        """Decode the group's samples beside all others; stamp them with the versions held."""
        fault = self._faults.next("work")
        began_s = asyncio.get_running_loop().time()
        if self._gate is not None:
            await self._pass_gate()
        if fault == "hang":
            await self._process.wait(self._hang_s)
            raise RoleError(f"{self.name}: prompt {prompt.index} took longer than {self._hang_s} s")
        engine = self._engine
        decoding = engine.add(self._lengths(prompt.index))
        try:
            await self._process.wait_for(decoding.over)
        except asyncio.CancelledError:
            engine.abort(decoding)
            raise
        if fault == "die":
            self._end()
        if fault is not None:
            raise error_of(fault, self.name)
        seconds = asyncio.get_running_loop().time() - began_s
        return parcel_of(self.name, prompt, engine.spans(decoding), seconds)

    async def hold(self, groups: int) -> None:
        """The next `groups` calls begin together."""
        self._gate = (groups, [])

    async def load_weights(self, weights: Weights) -> None:
        """Freeze what is in flight for `load_s`; it goes on under the new weights."""
        self._engine.freeze(self._load_s)
        await self._process.wait(self._load_s)
        self._engine.switch(weights.version)

    async def restart(self) -> None:
        """A new process, with no weights of the run."""
        self._end()
        await asyncio.sleep(self._restart_s)
        self._busy_before_s += self._engine.busy_s
        self._process, self._engine, self._gate = Process(self.name), Engine(self._pace), None

    async def close(self) -> None:
        self._end()

    def _end(self) -> None:
        self._process.die()
        self._engine.stop()

    async def _pass_gate(self) -> None:
        assert self._gate is not None
        groups, waiting = self._gate
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(mine)
        if len(waiting) == groups:
            self._gate = None
            for each in waiting:
                resolve(each)
        await self._process.wait_for(mine)


@dataclass(eq=False, slots=True)
class _Request:
    tokens: int
    over: asyncio.Future[None]


class SimScorer:
    """A scorer that takes all that waits in one forward pass: jitter · (base + tokens · seconds a
    token).

    Attributes:
        busy_s: seconds in which it scored something.
    """

    def __init__(
        self,
        name: str,
        *,
        base_s: float,
        token_s: float,
        restart_s: float,
        faults: Faults,
        jitter: Callable[[], float],
    ) -> None:
        self.name = name
        self.busy_s = 0.0
        self._base_s, self._token_s, self._restart_s = base_s, token_s, restart_s
        self._faults, self._jitter = faults, jitter
        self._process = Process(name)
        self._waiting: list[_Request] = []
        self._batch: list[_Request] = []

    async def score(self, group: Parcel[GroupInfo]) -> Parcel[ScoredInfo]:
        """Wait for the pass that this group is in. The reward is 0."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        fault = self._faults.next("work")
        self._waiting.append(_Request(sum(group.info.lengths), loop.create_future()))
        mine = self._waiting[-1]
        if not self._batch:
            self._pass()
        await self._process.wait_for(mine.over)
        if fault == "die":
            self._process.die()
        if fault is not None:
            raise error_of(fault, self.name)
        info = ScoredInfo(
            group=group.info,
            rewards=(0.0,) * len(group.info.lengths),
            seconds=loop.time() - began_s,
            scorer=self.name,
        )
        return Parcel(info=info, payload=group.payload)

    def _pass(self) -> None:
        self._batch, self._waiting = self._waiting, []
        tokens = sum(request.tokens for request in self._batch)
        seconds = self._jitter() * (self._base_s + self._token_s * tokens)
        self.busy_s += seconds
        asyncio.get_running_loop().call_later(seconds, self._passed, self._process)

    def _passed(self, process: Process) -> None:
        if process is not self._process:  # it was restarted meanwhile
            return
        for request in self._batch:
            resolve(request.over)
        self._batch = []
        if self._waiting:
            self._pass()

    async def restart(self) -> None:
        self._process.die()
        await asyncio.sleep(self._restart_s)
        self._process, self._waiting, self._batch = Process(self.name), [], []

    async def close(self) -> None:
        self._process.die()


class SimLearner:
    """A learner that takes jitter · (base + tokens · seconds a token), and looks at every token's
    age.

    Attributes:
        busy_s: seconds in which it learned or published.
        ages: tokens trained on, by age in versions.
    """

    def __init__(
        self, *, base_s: float, token_s: float, publish_s: float, jitter: Callable[[], float]
    ) -> None:
        self.busy_s = 0.0
        self.ages: Counter[int] = Counter()
        self.step = self.version = 0
        self._base_s, self._token_s, self._publish_s = base_s, token_s, publish_s
        self._jitter = jitter

    async def learn(self, payloads: Sequence[FakeGroup], *, oldest: int = 0) -> StepReport:
        tokens = 0
        for group in payloads:
            for spans in group.spans:
                tokens += spans[-1].end
                for span in spans:
                    if span.version >= oldest:
                        self.ages[self.version - span.version] += span.end - span.start
        seconds = self._jitter() * (self._base_s + self._token_s * tokens)
        self.busy_s += seconds
        await asyncio.sleep(seconds)
        self.step += 1
        self.version += 1
        return StepReport(step=self.step, version=self.version, skipped=False, metrics={})

    async def publish(self) -> Weights:
        self.busy_s += self._publish_s
        await asyncio.sleep(self._publish_s)
        return weights_of(self.version)

    async def save(self, folder: Path) -> None: ...

    async def load(self, folder: Path) -> None: ...

    async def export(self, folder: Path) -> None: ...

    async def close(self) -> None: ...


class NoCheckpoints:
    """Takes checkpoints and forgets them."""

    def begin(self, step: int) -> Path:
        return Path()

    def commit(self, step: int, state: Any) -> Path:
        return Path()


def jittered(sigma: float, seed: int) -> Callable[[], float]:
    """Log-normal factors around a mean of 1; always 1 where sigma is 0."""
    if not sigma:
        return lambda: 1.0
    draw = random.Random(seed)
    mean = -sigma * sigma / 2
    return lambda: draw.lognormvariate(mean, sigma)
