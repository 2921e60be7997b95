"""An engine's pace: all running sequences share it, and each iteration gives each a token.

With n sequences running an iteration takes a + b·n seconds (weights are read once, each sequence
adds its own work). Progress is counted in iterations: a sequence of L tokens that starts at
progress P ends at P + L, whatever else starts and ends meanwhile, so one heap of ends and one
timer are enough, and an event costs O(log n).
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from distrl.records import VersionSpan
from distrl.sim.process import resolve

_EPSILON = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """Seconds of an iteration: `iteration_s` + `sequence_s` for each of at most `max_seqs`."""

    iteration_s: float
    sequence_s: float
    max_seqs: int


@dataclass(eq=False, slots=True)
class Decoding:
    """Sequences of one request. `over` is done when the last has ended."""

    lengths: Sequence[int]
    over: asyncio.Future[None]
    starts: list[float] = field(default_factory=list)
    left: int = 0


class Engine:
    """Sequences under way, at a common pace.

    Attributes:
        busy_s: seconds in which at least one sequence ran.
    """

    def __init__(self, pace: Pace) -> None:
        self.busy_s = 0.0
        self._pace = pace
        self._loop = asyncio.get_running_loop()
        self._progress = 0.0
        self._then = self._loop.time()
        self._frozen_until = 0.0
        self._ends: list[tuple[float, int, Decoding]] = []
        self._ties = itertools.count()
        self._queue: deque[tuple[int, Decoding]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._switches: list[float] = []
        self._versions: list[int] = []

    def add(self, lengths: Sequence[int]) -> Decoding:
        """Sequences that will have so many tokens; those beyond `max_seqs` wait their turn."""
        self._advance()
        decoding = Decoding(lengths, self._loop.create_future(), left=len(lengths))
        self._queue.extend((length, decoding) for length in lengths)
        self._fill()
        return decoding

    def abort(self, decoding: Decoding) -> None:
        """Nobody waits for it any more: its sequences leave at once."""
        self._advance()
        self._queue = deque(entry for entry in self._queue if entry[1] is not decoding)
        self._ends = [entry for entry in self._ends if entry[2] is not decoding]
        heapq.heapify(self._ends)
        self._fill()

    def freeze(self, seconds: float) -> None:
        """Stand still for so long, with everything in flight."""
        self._advance()
        self._frozen_until = max(self._frozen_until, self._loop.time() + seconds)
        self._set_timer()

    def switch(self, version: int) -> None:
        """Tokens from now on are of `version`."""
        self._advance()
        self._switches.append(self._progress)
        self._versions.append(version)

    @property
    def version(self) -> int | None:
        return self._versions[-1] if self._versions else None

    def spans(self, decoding: Decoding) -> tuple[tuple[VersionSpan, ...], ...]:
        """Which version gave which tokens, for each sequence of a request that has ended."""
        pairs = zip(decoding.starts, decoding.lengths, strict=True)
        return tuple(self._spans(start, length) for start, length in pairs)

    def _spans(self, start: float, length: int) -> tuple[VersionSpan, ...]:
        place = bisect_right(self._switches, start + _EPSILON) - 1
        spans, begun = [], 0
        while begun < length:
            after = place + 1
            end = length
            if after < len(self._switches):
                end = min(length, int(self._switches[after] - start + _EPSILON))
            if end > begun:
                spans.append(VersionSpan(version=self._versions[place], start=begun, end=end))
                begun = end
            place = after
        return tuple(spans)

    def _iteration_s(self) -> float:
        return self._pace.iteration_s + self._pace.sequence_s * len(self._ends)

    def _advance(self) -> None:
        """Bring progress up to now."""
        now = self._loop.time()
        ran = now - max(self._then, min(now, self._frozen_until))
        if self._ends:
            self.busy_s += now - self._then
            if ran > 0:
                self._progress += ran / self._iteration_s()
        self._then = now

    def _fill(self) -> None:
        while self._queue and len(self._ends) < self._pace.max_seqs:
            length, decoding = self._queue.popleft()
            decoding.starts.append(self._progress)
            heapq.heappush(self._ends, (self._progress + length, next(self._ties), decoding))
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ends:
            left = max(0.0, self._ends[0][0] - self._progress) * self._iteration_s()
            thaw = max(0.0, self._frozen_until - self._loop.time())
            self._timer = self._loop.call_later(thaw + left, self._tick)

    def _tick(self) -> None:
        self._advance()
        if self._ends and self._loop.time() >= self._frozen_until:
            # Rounding must not leave the next end a hair away for ever.
            self._progress = max(self._progress, self._ends[0][0])
        while self._ends and self._ends[0][0] <= self._progress + _EPSILON:
            decoding = heapq.heappop(self._ends)[2]
            decoding.left -= 1
            if not decoding.left:
                resolve(decoding.over)
        self._fill()

    def stop(self) -> None:
        """The process is gone."""
        if self._timer is not None:
            self._timer.cancel()
        self._ends, self._queue = [], deque()
