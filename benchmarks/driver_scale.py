"""What the driver itself costs, and how it fares against the rate of Ray's calls.

    python benchmarks/driver_scale.py [--generators 64] [--groups 4000] [--flat 100000]

    without Ray    roles that answer at once, in one process: microseconds a group, ledger on and
                   off, and memory over many groups
    bare Ray       the calls that a group needs at least (generate, then score what came of it by
                   reference), by hand: groups/s
    one a group    the driver over actors, a call for each group and role
    batched        the driver over actors by the production handles, many groups a call

All actors answer at once: what is measured is dispatch. Ray's processes and the driver share the
same cores. Thresholds, set before the first run: 200 us a group without Ray; 0.8 of the bare rate
with a call a group, more than the bare rate when batched; memory flat.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from common import report

from distrl.actors.batching import Desk, unpacked
from distrl.actors.cluster import connected
from distrl.actors.handles import GeneratorHandle, ScorerHandle
from distrl.actors.workers import remote
from distrl.config import Config, DriverConfig
from distrl.driver.driver import Driver
from distrl.driver.ledger import FileLedger, Ledger
from distrl.driver.ledger_file import LedgerFile
from distrl.records import (
    GroupInfo,
    Parcel,
    Prompt,
    ScoredInfo,
    VersionSpan,
    Weights,
)
from distrl.sim import CountingSource, FakeGenerator, FakeLearner, FakeScorer, fixed
from distrl.sim.ports import Rows
from distrl.sim.roles import NoCheckpoints

BATCH = 256
SPANS = ((VersionSpan(version=0, start=0, end=8),),) * 2


def info_of(index: int, name: str) -> GroupInfo:
    return GroupInfo(
        index=index,
        prompt_id=str(index),
        generator=name,
        lengths=(8, 8),
        spans=SPANS,
        finish_reasons=("stop", "stop"),
        nbytes=128,
        seconds=0.0,
    )


class FakeEngine:
    """An actor that generates and scores in no time."""

    def __init__(self, name: str = "engine") -> None:
        self.name, self.desk = name, Desk()
        self.tokens = np.zeros(16, np.int32)

    async def node(self) -> str:
        return ""

    async def start(self) -> None: ...

    async def left_when_killed(self) -> list[Path]:
        return []

    @ray.method(num_returns=2)
    async def generate(self, prompt: Prompt) -> tuple[GroupInfo, Any]:
        return info_of(prompt.index, self.name), self.tokens

    @ray.method(num_returns=2)
    async def score(self, info: GroupInfo, payload: Any) -> tuple[ScoredInfo, Any]:
        return ScoredInfo(group=info, rewards=(0.0, 0.0), seconds=0.0), payload

    async def take(self, batch: Sequence[Any], where: Sequence[Any] = (), *batches: Any) -> None:
        payloads = unpacked(where, batches) if batches else [None] * len(batch)
        for (ticket, question), payload in zip(batch, payloads, strict=True):
            self.desk.take(ticket, self._answer(question, payload))

    async def _answer(self, question: Any, payload: Any) -> tuple[Any, Any]:
        if isinstance(question, GroupInfo):
            return ScoredInfo(group=question, rewards=(0.0, 0.0), seconds=0.0), payload
        return info_of(question.index, self.name), self.tokens

    @ray.method(num_returns=2)
    async def give(self) -> Any:
        return await self.desk.give()

    async def drop(self, ticket: int) -> None:
        self.desk.drop(ticket)

    async def load_weights(self, weights: Weights) -> None: ...

    async def close(self) -> None: ...


class OneCallGenerator(GeneratorHandle):
    """A call a group."""

    async def generate(self, prompt: Prompt) -> Parcel[GroupInfo]:
        info, payload = self.running().generate.remote(prompt)
        return Parcel(info=await self.alive(info), payload=payload)


class OneCallScorer(ScorerHandle):
    """A call a group."""

    async def score(self, group: Parcel[GroupInfo]) -> Parcel[ScoredInfo]:
        info, payload = self.running().score.remote(group.info, group.payload)
        return Parcel(info=await self.alive(info), payload=payload)


class InstantLearner(FakeLearner):
    """Looks at nothing."""

    def __init__(self) -> None:
        super().__init__(seconds=fixed(0.0), publish_seconds=fixed(0.0))

    async def save(self, folder: Path) -> None:
        """Nothing is worth keeping."""

    def _look_at(self, group: Any, oldest: int) -> Any:
        return None

    async def learn(self, payloads: Sequence[Any], *, oldest: int = 0) -> Any:
        self.trained.clear()
        answer = await super().learn([], oldest=oldest)
        self.version = 0  # the fakes' tokens are of version 0 for ever
        return type(answer)(step=answer.step, version=0, skipped=True, metrics={})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--generators", type=int, default=64)
    parser.add_argument("--groups", type=int, default=4000)
    parser.add_argument("--flat", type=int, default=100_000)
    options = parser.parse_args()
    alone = min(asyncio.run(_alone(options.groups, options.generators)) for _ in range(3))
    with_ledger = min(
        asyncio.run(_alone(options.groups, options.generators, ledger=True)) for _ in range(3)
    )
    print(f"without Ray: {alone * 1e6:.0f} us, {with_ledger * 1e6:.0f} with ledger", flush=True)
    early, late = asyncio.run(_flat(options.flat, options.generators))
    with connected(Config()):
        bare, one, batched = asyncio.run(_over_ray(options.groups, options.generators))
    report(
        f"The driver at {options.generators} generators",
        {
            "without Ray, us a group": f"{alone * 1e6:.0f}",
            "without Ray, with ledger, us a group": f"{with_ledger * 1e6:.0f}",
            f"memory after {options.flat // 5:,} / {options.flat:,} groups, MiB": (
                f"{early:.1f} / {late:.1f}"
            ),
            "bare Ray, groups/s": f"{bare:.0f}",
            "driver, a call a group": f"{one:.0f} groups/s, {one / bare:.2f} of bare",
            "driver, batched": f"{batched:.0f} groups/s, {batched / bare:.2f} of bare",
        },
        f"python benchmarks/driver_scale.py --generators {options.generators} "
        f"--groups {options.groups} --flat {options.flat}",
    )


async def _drive(
    groups: int,
    generators: Sequence[Any],
    scorers: Sequence[Any],
    ledger: Ledger | None = None,
    sink: Any = None,
) -> float:
    """Seconds that the driver takes for so many groups."""
    steps = max(1, groups // BATCH)
    driver = Driver(
        DriverConfig(steps=steps, prompts_per_step=BATCH, max_staleness=1),
        source=CountingSource(),
        generators=generators,
        scorers=scorers,
        learner=InstantLearner(),
        sink=sink or Rows(),
        checkpoints=NoCheckpoints(),
        samples_per_prompt=2,
        ledger=ledger,
    )
    began = time.perf_counter()
    await driver.run()
    return (time.perf_counter() - began) / (steps * BATCH) * groups


async def _alone(groups: int, workers: int, *, ledger: bool = False) -> float:
    """Seconds a group, without Ray."""
    with tempfile.TemporaryDirectory(prefix="distrl-benchmark-") as folder:
        kept = None
        if ledger:
            kept = FileLedger(LedgerFile(Path(folder) / "ledger.sqlite"), time.monotonic)
        seconds = await _drive(groups, _quick(workers), [FakeScorer("s0", seconds=_NOW)], kept)
        if kept is not None:
            kept.close()
    return seconds / groups


_NOW = fixed(0.0)


def _quick(workers: int) -> list[FakeGenerator]:
    return [FakeGenerator(f"g{i}", seconds=_NOW, load_seconds=_NOW) for i in range(workers)]


class _Sizes(Rows):
    """Looks at memory once a step and keeps no row."""

    def __init__(self) -> None:
        super().__init__()
        self.mib: list[float] = []

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self.mib.append(psutil.Process().memory_info().rss / 2**20)


class _ForgetfulGenerator(FakeGenerator):
    async def generate(self, prompt: Prompt) -> Parcel[GroupInfo]:
        self.served.clear()  # a test's record, not the driver's
        return await super().generate(prompt)


class _ForgetfulScorer(FakeScorer):
    async def score(self, group: Parcel[GroupInfo]) -> Parcel[ScoredInfo]:
        self.scored.clear()
        return await super().score(group)


async def _flat(groups: int, workers: int) -> tuple[float, float]:
    """Resident memory (MiB) after a fifth of the groups of a run, and after all of them."""
    names = [f"g{i}" for i in range(workers)]
    generators = [_ForgetfulGenerator(n, seconds=_NOW, load_seconds=_NOW) for n in names]
    sizes = _Sizes()
    await _drive(groups, generators, [_ForgetfulScorer("s0", seconds=_NOW)], sink=sizes)
    return sizes.mib[len(sizes.mib) // 5], sizes.mib[-1]


async def _over_ray(groups: int, workers: int) -> tuple[float, float, float]:
    """Groups/s: bare, a call a group, batched; each the best of two, in turns."""
    with tempfile.TemporaryDirectory(prefix="distrl-benchmark-") as folder:
        log = Path(folder) / "log"
        log.touch()
        actor = remote(FakeEngine).options(num_cpus=0, max_concurrency=10_000)
        actors = [actor.remote(f"g{i}") for i in range(workers)]
        scorer = actor.remote("s0")
        began = time.perf_counter()
        await asyncio.gather(*(a.node.remote() for a in [*actors, scorer]))
        print(f"{workers + 1} actors up in {time.perf_counter() - began:.0f} s", flush=True)

        def handle(kind: Any, name: str, one: Any) -> Any:
            made = kind(name, lambda: one, log, 60.0)
            made.actor = one
            made.learner = made
            return made

        best = [0.0, 0.0, 0.0]
        for _ in range(2):
            rates = [await _bare(groups, actors, scorer)]
            for generator, score in (
                (OneCallGenerator, OneCallScorer),
                (GeneratorHandle, ScorerHandle),
            ):
                handles = [handle(generator, f"g{i}", a) for i, a in enumerate(actors)]
                seconds = await _drive(groups, handles, [handle(score, "s0", scorer)])
                rates.append(groups / seconds)
            print("groups/s:", [f"{rate:.0f}" for rate in rates], flush=True)
            best = [max(pair) for pair in zip(best, rates, strict=True)]
    return best[0], best[1], best[2]


async def _bare(groups: int, actors: Sequence[Any], scorer: Any) -> float:
    """Groups/s of the same two calls a group, with as many under way as the driver has slots."""
    source, slots = CountingSource(), asyncio.Semaphore(2 * BATCH)

    async def one(index: int, prompt: Prompt) -> None:
        async with slots:
            info, payload = actors[index % len(actors)].generate.remote(prompt)
            scored, _ = scorer.score.remote(await info, payload)
            await scored

    began = time.perf_counter()
    await asyncio.gather(*(one(index, source.next()) for index in range(groups)))
    return groups / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
