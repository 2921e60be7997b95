"""Roles that only pass the time, stamp versions as an engine would, fail as scripted, and
write down what happened to them.

A payload is a `FakeGroup`: the version of every token of every sample, by span, so that the
learner can measure the age of what it trains on by itself, not by the driver's word.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distrl.records import GroupInfo, Parcel, Prompt, ScoredInfo, StepReport, VersionSpan, Weights
from distrl.roles import LearnerFailed
from distrl.sim.process import Process
from distrl.sim.script import Faults, Seconds, error_of, fixed

BYTES_PER_TOKEN = 8
_TWENTIETH_S, _TENTH_S, _ONE_S, _FIVE_S = fixed(0.05), fixed(0.1), fixed(1.0), fixed(5.0)
_PROBE_IDS = np.zeros(2, np.int32)
_PROBE_LOGPROBS = np.zeros(1, np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeGroup:
    """A group without text: its prompt's index, and the spans of each sample."""

    index: int
    spans: tuple[tuple[VersionSpan, ...], ...]


class FakeGenerator:
    """Generates for `seconds()`; a sample's tokens come evenly over that time.

    Attributes:
        served: (index, time, version held) of each generate call that began.
        held: n of each `hold(n)`.
        loaded: versions taken on, in order.
        restarts: number of restarts.
    """

    def __init__(
        self,
        name: str,
        *,
        seconds: Seconds = _ONE_S,
        load_seconds: Seconds = _TENTH_S,
        restart_seconds: Seconds = _FIVE_S,
        length: Callable[[Prompt], int] = lambda prompt: 8,
        samples: int = 2,
        faults: Faults | None = None,
    ) -> None:
        self.name = name
        self.served: list[tuple[int, float, int | None]] = []
        self.held: list[int] = []
        self.loaded: list[int] = []
        self.restarts = 0
        self._seconds = seconds
        self._load_seconds = load_seconds
        self._restart_seconds = restart_seconds
        self._length = length
        self._samples = samples
        self._faults = faults or Faults()
        self._process = Process(name)
        self._history: list[tuple[float, int]] = []
        self._gate: asyncio.Event | None = None
        self._missing = 0

    async def generate(self, prompt: Prompt) -> Parcel[GroupInfo]:
        """A group whose spans follow the weights that were loaded while it was in flight."""
        loop = asyncio.get_running_loop()
        fault = self._faults.next("work")
        began_s = loop.time()
        self.served.append((prompt.index, began_s, self._version()))
        if fault == "die":
            await self._process.wait(self._seconds() / 2)
            self._process.die()
        if fault == "hang":
            await self._process.wait(None)
        await self._pass_gate()
        began_s = loop.time()
        await self._process.wait(self._seconds())
        if fault is not None:
            raise error_of(fault, self.name)
        spans = self._spans(began_s, loop.time(), self._length(prompt))
        return parcel_of(self.name, prompt, (spans,) * self._samples, loop.time() - began_s)

    async def hold(self, groups: int) -> None:
        """The next `groups` calls begin together."""
        await self._process.wait(0.0)
        self.held.append(groups)
        self._gate, self._missing = asyncio.Event(), groups

    async def load_weights(self, weights: Weights) -> None:
        """The switch happens at the end of the load."""
        fault = self._faults.next("load")
        await self._process.wait(None if fault == "hang" else self._load_seconds())
        if fault == "die":
            self._process.die()
        if fault is not None:
            raise error_of(fault, self.name)
        self.loaded.append(weights.version)
        self._history.append((asyncio.get_running_loop().time(), weights.version))

    async def restart(self) -> None:
        """A new process, with no weights of the run."""
        fault = self._faults.next("restart")
        self._process.die()
        self.restarts += 1
        await asyncio.sleep(self._restart_seconds())
        if fault is not None:
            raise error_of(fault, self.name)
        self._process = Process(self.name)
        self._history = []
        self._gate = None

    async def close(self) -> None:
        self._process.die()

    def _version(self) -> int | None:
        return self._history[-1][1] if self._history else None

    async def _pass_gate(self) -> None:
        if (gate := self._gate) is None:
            return
        self._missing -= 1
        if self._missing == 0:
            self._gate = None
            gate.set()
        await gate.wait()

    def _spans(self, began_s: float, ended_s: float, tokens: int) -> tuple[VersionSpan, ...]:
        """Token i is sampled at began + i/tokens of the time, by what was loaded last then."""
        spans: list[VersionSpan] = []
        end = tokens
        for when_s, version in reversed(self._history):
            past = when_s <= began_s
            share = 0.0 if past else (when_s - began_s) / (ended_s - began_s)
            start = min(tokens, math.ceil(share * tokens))
            if start < end:
                spans.append(VersionSpan(version=version, start=start, end=end))
                end = start
            if past:
                break
        return tuple(reversed(spans))


def parcel_of(
    name: str, prompt: Prompt, spans: tuple[tuple[VersionSpan, ...], ...], seconds: float
) -> Parcel[GroupInfo]:
    """What a fake generator hands on: a sample for each of `spans`."""
    lengths = tuple(each[-1].end for each in spans)
    info = GroupInfo(
        index=prompt.index,
        prompt_id=prompt.prompt_id,
        generator=name,
        lengths=lengths,
        spans=spans,
        finish_reasons=("stop",) * len(spans),
        nbytes=sum(lengths) * BYTES_PER_TOKEN,
        seconds=seconds,
    )
    return Parcel(info=info, payload=FakeGroup(index=prompt.index, spans=spans))


class FakeScorer:
    """Scores for `seconds()`.

    Attributes:
        scored: indices, in the order of their scores.
        asked: (when, index) of each call.
    """

    def __init__(
        self,
        name: str,
        *,
        seconds: Seconds = _TENTH_S,
        restart_seconds: Seconds = _ONE_S,
        reward: Callable[[int], float] = float,
        faults: Faults | None = None,
    ) -> None:
        self.name = name
        self.scored: list[int] = []
        self.asked: list[tuple[float, int]] = []
        self.restarts = 0
        self._seconds = seconds
        self._restart_seconds = restart_seconds
        self._reward = reward
        self._faults = faults or Faults()
        self._process = Process(name)

    async def score(self, group: Parcel[GroupInfo]) -> Parcel[ScoredInfo]:
        fault = self._faults.next("work")
        if fault == "die":
            self._process.die()
        self.asked.append((asyncio.get_running_loop().time(), group.info.index))
        seconds = self._seconds()
        await self._process.wait(None if fault == "hang" else seconds)
        if fault is not None:
            raise error_of(fault, self.name)
        self.scored.append(group.info.index)
        rewards = (self._reward(group.info.index),) * len(group.info.lengths)
        info = ScoredInfo(group=group.info, rewards=rewards, seconds=seconds, scorer=self.name)
        return Parcel(info=info, payload=group.payload)

    async def restart(self) -> None:
        fault = self._faults.next("restart")
        self._process.die()
        self.restarts += 1
        await asyncio.sleep(self._restart_seconds())
        if fault is not None:
            raise error_of(fault, self.name)
        self._process = Process(self.name)

    async def close(self) -> None:
        self._process.die()


def weights_of(version: int) -> Weights:
    """Weights that are nothing but their version."""
    return Weights(
        version=version,
        transport="shm",
        locator="",
        nbytes=0,
        probe_ids=_PROBE_IDS,
        probe_logprobs=_PROBE_LOGPROBS,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """One group at its gradient: the learner's step and version, the age of its oldest token."""

    index: int
    step: int
    version: int
    age: int
    ages: tuple[int, ...] = field(default=())


class FakeLearner:
    """Learns for `seconds()`; the steps in `skip` are non-finite, the one in `fail` fails.

    Attributes:
        trained: every group, in the order of training.
        published: versions, in order.
    """

    def __init__(
        self,
        *,
        seconds: Seconds = _ONE_S,
        publish_seconds: Seconds = _TWENTIETH_S,
        skip: Collection[int] = (),
        fail: int | None = None,
        metrics: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self.trained: list[Trained] = []
        self.published: list[int] = []
        self.step = 0
        self.version = 0
        self._seconds = seconds
        self._publish_seconds = publish_seconds
        self._skip = skip
        self._fail = fail
        self._metrics = metrics

    async def learn(self, payloads: Sequence[Any], *, oldest: int = 0) -> StepReport:
        for group in payloads:
            self.trained.append(self._look_at(group, oldest))
        await asyncio.sleep(self._seconds())
        if self.step + 1 == self._fail:
            raise LearnerFailed("scripted failure of the learner")
        self.step += 1
        skipped = self.step in self._skip
        self.version += not skipped
        return StepReport(
            step=self.step, version=self.version, skipped=skipped, metrics=self._metrics()
        )

    def _look_at(self, group: FakeGroup, oldest: int) -> Trained:
        versions = {span.version for spans in group.spans for span in spans}
        ages = {self.version - version for version in versions if version >= oldest}
        return Trained(
            index=group.index,
            step=self.step + 1,
            version=self.version,
            age=max(ages),
            ages=tuple(sorted(ages)),
        )

    async def publish(self) -> Weights:
        await asyncio.sleep(self._publish_seconds())
        self.published.append(self.version)
        return weights_of(self.version)

    async def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        state = {"step": self.step, "version": self.version}
        (folder / "state.json").write_text(json.dumps(state))

    async def load(self, folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        self.step, self.version = state["step"], state["version"]

    async def export(self, folder: Path) -> None:
        await self.save(folder)

    async def close(self) -> None:
        pass
