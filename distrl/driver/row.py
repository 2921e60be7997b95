"""The metrics row of a learner step: what the driver knows of it, by the names of `metrics`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from distrl.driver.buffer import Landed
from distrl.driver.staleness import Age
from distrl.metrics.sinks import Value

Row = dict[str, Value]


@dataclass(frozen=True, kw_only=True, slots=True)
class Durations:
    """Seconds of one learner step; `step` runs from the end of the step before. What is in none of
    the others went to the hook of rollouts, or to a checkpoint."""

    step: float
    idle: float
    learn: float
    publish: float


class Stopwatch:
    """Seconds since the last lap."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()

    def lap(self) -> float:
        now = self._clock()
        seconds, self._began = now - self._began, now
        return seconds


def batch_row(batch: Sequence[Landed], consumed_s: float) -> Row:
    """Rewards, lengths and times of the groups of a step, taken at `consumed_s`."""
    infos = [landed.parcel.info for landed in batch]
    rewards = np.array([reward for info in infos for reward in info.rewards])
    lengths = np.array([length for info in infos for length in info.group.lengths])
    cut = np.array([why == "length" for info in infos for why in info.group.finish_reasons])
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "rollout/length_mean": float(lengths.mean()),
        "rollout/truncated_fraction": float(cut.mean()),
        "time/generate": float(np.mean([info.group.seconds for info in infos])),
        "time/score": float(np.mean([info.seconds for info in infos])),
        "time/in_flight": float(np.mean([b.landed_s - b.admitted_s for b in batch])),
        "time/in_buffer": float(np.mean([consumed_s - b.landed_s for b in batch])),
    }


def staleness_row(batch: Sequence[Landed], ages: Sequence[Age], max_staleness: int) -> Row:
    """Ages in versions; every token of a group counts as old as the group's oldest.

    The driver sees no tokens. Where the learner reports `staleness/*` by token, its values
    take the place of these.
    """
    tokens = np.array([sum(landed.parcel.info.group.lengths) for landed in batch])
    versions = np.array([age.versions for age in ages])
    hist = np.bincount(versions, weights=tokens, minlength=max_staleness + 1)
    return {
        "staleness/bound": max_staleness,
        "staleness/max": int(versions.max()),
        "staleness/mean": float(np.average(versions, weights=tokens)),
        "staleness/hist": [int(count) for count in hist],
        "staleness/in_flight": float(np.average([a.in_flight for a in ages], weights=tokens)),
        "staleness/in_buffer": float(np.average([a.in_buffer for a in ages], weights=tokens)),
        "staleness/masked_tokens": sum(age.masked for age in ages),
    }


def duration_row(durations: Durations) -> Row:
    """Where the time of the step went."""
    return {
        "time/step": durations.step,
        "time/idle_learner": durations.idle,
        "time/learn": durations.learn,
        "time/publish": durations.publish,
    }
