"""The metrics row of a learner step: what the driver knows of it, by the names of `metrics`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from distrl.driver.buffer import Landed
from distrl.metrics.sinks import Value

Row = dict[str, Value]


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


def staleness_row(
    batch: Sequence[Landed], masked: Sequence[int], version: int, max_staleness: int
) -> Row:
    """Ages, in versions, of the tokens that reach the gradient of a learner at `version`, as their
    generators stamped them; `masked` of each group do not. A learner that looks at the tokens
    themselves reports its own figures, which take the place of these.
    """
    hist, in_flight = Counter[int](), 0
    for landed, left_out in zip(batch, masked, strict=True):
        floor = version - landed.bound if left_out else -math.inf
        for span in (span for spans in landed.parcel.info.group.spans for span in spans):
            if span.version >= floor:
                tokens = span.end - span.start
                hist[version - span.version] += tokens
                in_flight += tokens * max(0, landed.landed_version - span.version)
    total, oldest = hist.total(), max(hist)
    mean = sum(age * tokens for age, tokens in hist.items()) / total
    return {
        "staleness/bound": max_staleness,
        "staleness/max": oldest,
        "staleness/mean": mean,
        "staleness/hist": [hist[age] for age in range(max(oldest, max_staleness) + 1)],
        "staleness/in_flight": in_flight / total,
        "staleness/in_buffer": mean - in_flight / total,
        "staleness/masked_tokens": sum(masked),
    }
