"""The pace of a run's engines, from when its groups began and ended.

An iteration with n sequences takes a + b·n seconds (`engine.py`). A pair (a, b) is judged by a
replay: simulated engines get the run's groups when the real ones got them, stand still while the
run loaded weights, and let those beyond `generate.max_num_seqs` wait. How far the groups' seconds
are then from the run's says how good the pair is.

It is searched for as s, the seconds of an iteration at the usual number of sequences, and the
share of s that grows with their number. Where all groups ran in the same company, each share has
an s that explains them as well as the next, and the run cannot tell.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrl.sim.clock import run_virtual
from distrl.sim.engine import Decoding, Engine, Pace

Floats = NDArray[np.float64]

ALIKE = 0.005
"""Two paces that miss the groups' seconds by so little more or less explain them alike."""

LOOKED_AT = 2_000
"""Sequences whose ends are looked at, the earliest ones after the warm-up."""

SAME_S = 1e-3
"""Groups that an engine got within so many seconds came in order of issue."""

MIN_S = 1e-6
"""An iteration takes some time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A group as an engine met it: `began_s` of the run's clock, and the seconds until its end.

    `counts`: whether it says something of the pace; it takes its part in the replay in any case.
    """

    generator: str
    index: int
    began_s: float
    seconds: float
    lengths: tuple[int, ...]
    counts: bool

    @property
    def ended_s(self) -> float:
        return self.began_s + self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """All engines stood still from `at_s` for so many seconds: they took weights on."""

    at_s: float
    seconds: float


def pace_of(
    groups: Sequence[Group], stops: Sequence[Stop], max_seqs: int
) -> tuple[float, float, bool]:
    """(a, b) in seconds, and whether the run can tell the two apart."""
    return _Search(groups, stops, max_seqs).pace()


class _Search:
    def __init__(self, groups: Sequence[Group], stops: Sequence[Stop], max_seqs: int) -> None:
        self._groups = _looked_at(groups)
        self._stops, self._max_seqs = stops, max_seqs
        self._counts = np.array([group.counts for group in self._groups])
        self._seconds = np.array([max(group.seconds, MIN_S) for group in self._groups])
        self._usual = 1.0

    def pace(self) -> tuple[float, float, bool]:
        """See `pace_of`."""
        longest = np.array([max(1, *group.lengths) for group in self._groups])
        each = self._seconds / longest
        about, _ = self._best(0.0, math.log(each.min() / 2), math.log(each.max() * 2))
        tokens = sum(sum(group.lengths) for group in self._groups)
        self._usual = max(1.0, tokens * about / self._replay(about, 0.0)[1])
        misses = {share: self._near(share, about)[1] for share in (0.0, 1.0)}

        def miss(share: float) -> float:
            misses[share] = self._near(share, about)[1]
            return misses[share]

        best, _ = _lowest(miss, 0.0, 1.0, 0.02)
        good = [share for share in misses if misses[share] <= min(misses.values()) + ALIKE]
        told = max(good) - min(good) < 0.5
        share = best if told else (min(good) + max(good)) / 2
        pace = self._pace(self._near(share, about)[0], share)
        return pace.iteration_s, pace.sequence_s, told

    def _near(self, share: float, about: float) -> tuple[float, float]:
        return self._best(share, math.log(about) - 0.5, math.log(about) + 0.5)

    def _best(self, share: float, low: float, high: float) -> tuple[float, float]:
        """The s between e^low and e^high that misses least at this share, and its miss."""
        log_s, miss = _lowest(lambda log_s: self._miss(math.exp(log_s), share), low, high, 0.001)
        return math.exp(log_s), miss

    def _miss(self, s: float, share: float) -> float:
        """By what part the seconds of a group are missed, on average: mean |log(theirs / ours)|."""
        ours, _ = self._replay(s, share)
        return float(np.abs(np.log(ours / self._seconds))[self._counts].mean())

    def _replay(self, s: float, share: float) -> tuple[Floats, float]:
        return replayed(self._groups, self._stops, self._pace(s, share))

    def _pace(self, s: float, share: float) -> Pace:
        return Pace(
            iteration_s=max(s * (1 - share), MIN_S),
            sequence_s=s * share / self._usual,
            max_seqs=self._max_seqs,
        )


def _lowest(
    function: Callable[[float], float], low: float, high: float, within: float
) -> tuple[float, float]:
    """Where between `low` and `high` the function is lowest, and what it is there."""
    from scipy.optimize import minimize_scalar

    options: Any = {"xatol": within}
    found: Any = minimize_scalar(function, bounds=(low, high), method="bounded", options=options)
    return float(found.x), float(found.fun)


def _looked_at(groups: Sequence[Group]) -> list[Group]:
    """In the order in which engines got them, the groups that began until LOOKED_AT sequences that
    count had ended; of those that count, the ones that had ended by then."""
    if not any(group.counts for group in groups):
        groups = [replace(group, counts=True) for group in groups]
    until_s, ended = math.inf, 0
    for group in sorted(groups, key=lambda group: group.ended_s):
        ended += len(group.lengths) if group.counts else 0
        if ended >= LOOKED_AT:
            until_s = group.ended_s
            break
    ordered = sorted(groups, key=lambda group: (round(group.began_s / SAME_S), group.index))
    return [
        replace(group, counts=group.counts and group.ended_s <= until_s)
        for group in ordered
        if group.began_s <= until_s
    ]


def replayed(groups: Sequence[Group], stops: Sequence[Stop], pace: Pace) -> tuple[Floats, float]:
    """Seconds that each group takes on engines of this pace, and those that the engines worked."""
    return run_virtual(_replay(groups, stops, pace), limit_s=float("inf"))


async def _replay(
    groups: Sequence[Group], stops: Sequence[Stop], pace: Pace
) -> tuple[Floats, float]:
    loop, zero = asyncio.get_running_loop(), groups[0].began_s
    engines = {group.generator: Engine(pace) for group in groups}
    seconds = np.zeros(len(groups))

    def stop(wait_s: float) -> None:
        for engine in engines.values():
            engine.freeze(wait_s)

    for each in stops:
        if each.at_s >= zero:
            loop.call_at(each.at_s - zero, stop, each.seconds)
    under_way: list[Decoding] = []
    for place, group in enumerate(groups):
        wait_s = group.began_s - zero - loop.time()
        if wait_s > SAME_S:
            await asyncio.sleep(wait_s)
        under_way.append(engines[group.generator].add(group.lengths))

        def ended(_: object, place: int = place, began_s: float = loop.time()) -> None:
            seconds[place] = loop.time() - began_s

        under_way[-1].over.add_done_callback(ended)
    for decoding in under_way:
        await decoding.over
    await asyncio.sleep(0)  # others of the last ones' instant have been told of it by then
    return np.maximum(seconds, MIN_S), sum(engine.busy_s for engine in engines.values())
