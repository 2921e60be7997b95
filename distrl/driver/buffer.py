"""The buffer between scorers and learner: strict order of issue, each index exactly once.

Groups land in any order and leave in the order in which their prompts were issued, so a short
response never overtakes a long one and the lengths trained are the lengths issued. An index that
was dropped is passed over.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass

from distrl.driver.errors import DriverError
from distrl.records import Parcel, ScoredInfo


class BufferClosed(Exception):
    """The buffer was closed before a batch was complete."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Landed:
    """A scored group, when it was admitted and landed, and the learner's version at landing."""

    parcel: Parcel[ScoredInfo]
    admitted_s: float
    landed_s: float
    landed_version: int

    @property
    def index(self) -> int:
        return self.parcel.info.group.index


class OrderedBuffer:
    """Scored groups by index.

    Invariant: indices below `cursor` were taken or dropped; those from `cursor` to the frontier
    are ready or dropped; the frontier itself is still in flight, and what lies beyond it has
    landed (`_beyond`, holding None for a drop), is in flight, or was not issued yet.

    Attributes:
        groups: groups held.
        nbytes: their bytes of payload.
        drops: number of dropped indices below `cursor`, by reason.
    """

    def __init__(self, *, first: int, batch: int, capacity: int, max_bytes: int) -> None:
        """Expect indices from `first` on; hold at most `capacity` groups, and `max_bytes` bytes
        beyond the `batch` groups that the next take is for."""
        self.groups = 0
        self.nbytes = 0
        self.drops: Counter[str] = Counter()
        self._batch = batch
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._largest = 0
        self._frontier = first
        self._ready: deque[Landed] = deque()
        self._beyond: dict[int, Landed | None] = {}
        self._passed: deque[tuple[int, str]] = deque()
        self._reasons: dict[int, str] = {}
        self._closed = False
        self._changed = asyncio.Event()

    @property
    def cursor(self) -> int:
        """Lowest index that was neither taken nor dropped."""
        return self._ready[0].index if self._ready else self._frontier

    def room(self, in_flight: int) -> bool:
        """Whether one more group may be asked for while `in_flight` others are under way.

        The groups of the next batch always may, else the learner could wait for ever. Beyond
        those, every group under way is reckoned as large as the largest seen, and none is asked
        for before a first one showed how large they are. So `nbytes` stays within `max_bytes`, or
        one batch where that is more, unless groups grow larger than all before. What is under way
        may always land.
        """
        if self.groups + in_flight < self._batch:
            return True
        reserved = (in_flight + 1) * self._largest
        return self._largest > 0 and self.nbytes + reserved <= self._max_bytes

    def put(self, landed: Landed) -> None:
        """A group lands. Raises DriverError where its index was there before, or all is full."""
        if self.groups == self._capacity:
            raise DriverError(f"group {landed.index} landed in a buffer of {self._capacity}: full")
        nbytes = landed.parcel.info.group.nbytes
        self.groups += 1
        self.nbytes += nbytes
        self._largest = max(self._largest, nbytes)
        self._settle(landed.index, landed)

    def drop(self, index: int, reason: str) -> None:
        """A group will never land; pass over it."""
        self._reasons[index] = reason
        self._settle(index, None)

    async def take(self, count: int) -> list[Landed]:
        """Wait for the next `count` groups in order of issue. Raises BufferClosed."""
        while len(self._ready) < count:
            if self._closed:
                raise BufferClosed
            self._changed.clear()
            await self._changed.wait()
        taken = [self._ready.popleft() for _ in range(count)]
        self.groups -= count
        self.nbytes -= sum(landed.parcel.info.group.nbytes for landed in taken)
        self._tally()
        return taken

    def close(self) -> None:
        """Let whoever waits in `take` go."""
        self._closed = True
        self._changed.set()

    def _settle(self, index: int, landed: Landed | None) -> None:
        if index < self._frontier or index in self._beyond:
            raise DriverError(f"group {index} landed or was dropped twice")
        self._beyond[index] = landed
        while self._frontier in self._beyond:
            entry = self._beyond.pop(self._frontier)
            if entry is None:
                self._passed.append((self._frontier, self._reasons.pop(self._frontier)))
            else:
                self._ready.append(entry)
            self._frontier += 1
        self._tally()
        self._changed.set()

    def _tally(self) -> None:
        while self._passed and self._passed[0][0] < self.cursor:
            self.drops[self._passed.popleft()[1]] += 1
