"""A whole run in virtual time: the production driver, buffer and ledger over simulated roles."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distrl.config import Config, SimulateConfig
from distrl.driver.driver import Driver
from distrl.driver.ledger import FileLedger, Ledger
from distrl.driver.ledger_file import LedgerFile
from distrl.driver.row import Row
from distrl.driver.state import Summary
from distrl.sim.clock import run_virtual
from distrl.sim.engine import Pace
from distrl.sim.ports import CountingSource, Rows
from distrl.sim.roles import (
    NoCheckpoints,
    SimGenerator,
    SimLearner,
    SimScorer,
    drawn_lengths,
    jittered,
    log_normal_lengths,
)
from distrl.sim.script import Faults


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a simulated run came to.

    Attributes:
        seconds: virtual seconds; real_s: real ones.
        samples_per_second: of virtual time.
        idle: share of time that generators, scorers and the learner did nothing.
        ages: share of trained tokens by age in versions.
        wasted_tokens: response tokens that were generated and given up.
        restarts, drops, retries: how much went wrong.
        rows: the metrics row of every step, as a real run's metrics.jsonl has it.
    """

    seconds: float
    real_s: float
    steps: int
    samples: int
    samples_per_second: float
    tokens_per_second: float
    idle: dict[str, float]
    ages: dict[int, float]
    wasted_tokens: int
    restarts: int
    drops: int
    retries: int
    rows: tuple[tuple[int, Row], ...]


def simulate(config: Config, ledger: Path | None = None) -> Outcome:
    """Run `config` in virtual time; the same config gives the same outcome.

    `ledger`: a file to keep the ledger in. Raises what `Driver.run` raises.
    """
    with _rarely_collected():
        return run_virtual(_Simulation(config, ledger).run(), limit_s=float("inf"))


@contextmanager
def _rarely_collected() -> Iterator[None]:
    """A simulation makes millions of short-lived objects and hardly a cycle: looking for cycles
    took a quarter of its time."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _Simulation:
    def __init__(self, config: Config, ledger: Path | None) -> None:
        self._config, self._ledger_path = config, ledger
        model = config.simulate
        pool = model.lengths or log_normal_lengths(
            model.length_median, model.length_sigma, config.generate.max_new_tokens, model.seed
        )
        longest = config.generate.max_new_tokens
        self._lengths = drawn_lengths(
            [min(length, longest) for length in pool], config.generate.samples_per_prompt
        )

    async def run(self) -> Outcome:
        config, clock = self._config, asyncio.get_running_loop().time
        model = config.simulate
        generators = [self._generator(i) for i in range(config.generate.workers)]
        scorers = [self._scorer(i) for i in range(config.score.workers)]
        learner = SimLearner(
            base_s=model.learn_s,
            jitter=jittered(model.jitter, model.seed + 1),
            token_s=model.learn_token_s,
            publish_s=model.publish_s,
        )
        sink, ledger = Rows(), self._ledger(clock)

        async def between_steps(*_: object) -> None:
            await asyncio.sleep(model.other_s)

        driver = Driver(
            # All rewards are 0 here: none of them would be a signal.
            config.driver.model_copy(update={"skip_without_signal": False}),
            source=CountingSource(),
            generators=generators,
            scorers=scorers,
            learner=learner,
            sink=sink,
            checkpoints=NoCheckpoints(),
            samples_per_prompt=config.generate.samples_per_prompt,
            clock=clock,
            on_rollouts=between_steps if model.other_s else None,
            ledger=ledger,
        )
        began = time.perf_counter()
        try:
            summary = await driver.run()
        finally:
            ledger.close()
            for role in (*generators, *scorers):
                await role.close()
        return _outcome(summary, sink, generators, scorers, learner, time.perf_counter() - began)

    def _generator(self, place: int) -> SimGenerator:
        config, model = self._config, self._config.simulate
        slow = random.Random(f"{model.seed} {place}").random() < model.slow_rate
        factor = model.slow_factor if slow else 1.0
        return SimGenerator(
            f"generator-{place}",
            Pace(
                iteration_s=model.iteration_s * factor,
                sequence_s=model.sequence_s * factor,
                max_seqs=config.generate.max_num_seqs,
            ),
            self._lengths,
            load_s=model.load_s,
            restart_s=model.restart_s,
            hang_s=config.generate.request_timeout_s,
            faults=self._faults(place),
        )

    def _scorer(self, place: int) -> SimScorer:
        model = self._config.simulate
        return SimScorer(
            f"scorer-{place}",
            base_s=model.score_s,
            jitter=jittered(model.jitter, model.seed + 1000 + place),
            token_s=model.score_token_s,
            restart_s=model.restart_s,
            faults=Faults(),
        )

    def _faults(self, place: int) -> Faults:
        model: SimulateConfig = self._config.simulate
        return Faults(
            rate=model.fail_rate,
            death_rate=model.death_rate,
            hang_rate=model.hang_rate,
            seed=model.seed * 1_000_003 + place,
        )

    def _ledger(self, clock: Callable[[], float]) -> Ledger:
        if self._ledger_path is None:
            return Ledger()
        return FileLedger(LedgerFile(self._ledger_path), clock)


def _outcome(
    summary: Summary,
    sink: Rows,
    generators: list[SimGenerator],
    scorers: list[SimScorer],
    learner: SimLearner,
    real_s: float,
) -> Outcome:
    seconds = sum(float(row["time/step"]) for _, row in sink.rows)
    everyone = {"generators": generators, "scorers": scorers, "learner": [learner]}
    total = learner.ages.total()
    return Outcome(
        seconds=seconds,
        real_s=real_s,
        steps=summary.steps,
        samples=summary.samples,
        samples_per_second=summary.samples / seconds,
        tokens_per_second=summary.tokens / seconds,
        idle={
            role: max(0.0, 1 - sum(one.busy_s for one in roles) / (len(roles) * seconds))
            for role, roles in everyone.items()
        },
        ages={age: learner.ages[age] / total for age in sorted(learner.ages)},
        wasted_tokens=int(sink.rows[-1][1]["waste/tokens"]) if sink.rows else 0,
        restarts=summary.restarts,
        drops=sum(summary.drops.values()),
        rows=tuple(sink.rows),
        retries=int(sink.rows[-1][1]["driver/retries"]) if sink.rows else 0,
    )
