"""The buffer between scorers and learner: order of issue, each index exactly once.

Groups land in any order and leave in the order in which their prompts were issued, so a short
response never overtakes a long one and the lengths trained are the lengths issued. An index that
was dropped is passed over. With a look-ahead window of W, one that is still in flight may be
overtaken by the W indices after it, and by no others.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

from distrl.driver.errors import DriverError
from distrl.records import Parcel, ScoredInfo


class BufferClosed(Exception):
    """The buffer was closed before a batch was complete."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Landed:
    """A scored group, when it was admitted and landed, the staleness bound it was admitted under,
    and the learner's version at landing."""

    parcel: Parcel[ScoredInfo]
    bound: int
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
    landed (`_beyond`, holding None for what was dropped or taken), is in flight, or was not
    issued yet.

    Attributes:
        batch: groups that a take is for.
        groups: groups held.
        nbytes: their bytes of payload.
        drops: number of dropped indices below `cursor`, and of swept ones, by reason.
        ahead: indices above `cursor` that were taken or swept: a resume must not issue them.
    """

    def __init__(
        self,
        *,
        first: int,
        batch: int,
        capacity: int,
        max_bytes: int,
        window: int = 0,
        ahead: Collection[int] = (),
    ) -> None:
        """Expect indices from `first` on but for those in `ahead`; hold at most `capacity` groups,
        and `max_bytes` bytes beyond the `batch` groups that the next take is for."""
        self.groups = 0
        self.nbytes = 0
        self.drops: Counter[str] = Counter()
        self.batch = batch
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._largest = 0
        self._frontier = first
        self._ready: deque[Landed] = deque()
        self.ahead = set(ahead)
        self._window = window
        self._beyond: dict[int, Landed | None] = dict.fromkeys(ahead)
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
        if self.groups + in_flight < self.batch:
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
        """Wait for the next `count` groups that may leave, and take them in order of issue.
        Raises BufferClosed."""
        while len(self._ready) + len(overtaking := self._overtaking()) < count:
            if self._closed:
                raise BufferClosed
            self._changed.clear()
            await self._changed.wait()
        taken = [self._ready.popleft() for _ in range(min(count, len(self._ready)))]
        for index in overtaking[: count - len(taken)]:
            landed = self._beyond[index]
            assert landed is not None
            taken.append(landed)
            self._beyond[index] = None
            self.ahead.add(index)
        self._removed(taken)
        return taken

    def sweep(self, doomed: Callable[[Landed], bool], reason: str) -> list[Landed]:
        """Drop for good the groups here that are `doomed`, and return them."""
        swept = [landed for landed in self._ready if doomed(landed)]
        if swept:
            self._ready = deque(landed for landed in self._ready if not doomed(landed))
        beyond = [landed for landed in self._beyond.values() if landed and doomed(landed)]
        for landed in beyond:
            self._beyond[landed.index] = None
        swept += beyond
        self.drops[reason] += len(swept)
        self.ahead.update(landed.index for landed in swept)
        self._removed(swept)
        return swept

    def _overtaking(self) -> list[int]:
        """Indices beyond the frontier that may be taken, in order."""
        if not self._window:
            return []
        last = self._frontier + self._window
        return sorted(i for i, landed in self._beyond.items() if landed is not None and i <= last)

    def _removed(self, gone: list[Landed]) -> None:
        self.groups -= len(gone)
        self.nbytes -= sum(landed.parcel.info.group.nbytes for landed in gone)
        self._tally()

    def close(self) -> None:
        """Let whoever waits in `take` go."""
        self._closed = True
        self._changed.set()

    def _settle(self, index: int, landed: Landed | None) -> None:
        if index < self._frontier or index in self._beyond:
            raise DriverError(f"group {index} landed or was dropped twice")
        self._beyond[index] = landed
        while self._frontier in self._beyond:
            self._advance(self._beyond.pop(self._frontier))
        self._tally()
        self._changed.set()

    def _advance(self, entry: Landed | None) -> None:
        if entry is not None:
            self._ready.append(entry)
        elif (reason := self._reasons.pop(self._frontier, None)) is not None:
            self._passed.append((self._frontier, reason))
        self._frontier += 1

    def _tally(self) -> None:
        if self.ahead:
            self.ahead = {index for index in self.ahead if index > self.cursor}
        while self._passed and self._passed[0][0] < self.cursor:
            self.drops[self._passed.popleft()[1]] += 1
