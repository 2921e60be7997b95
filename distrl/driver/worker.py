"""A worker as the fleet sees it, and the least loaded of many in logarithmic time."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from distrl.roles import RoleError


class Role(Protocol):
    """What every role of a fleet can do."""

    @property
    def name(self) -> str: ...

    async def restart(self) -> None: ...


R = TypeVar("R", bound=Role)


@dataclass(eq=False, slots=True)
class Call:
    """A task inside a call to a worker. To abandon it is to cancel the task, and to remember that
    it was not the task that somebody wanted gone."""

    task: asyncio.Task[Any]
    abandoned: bool = False

    def abandon(self) -> None:
        if not self.abandoned:
            self.abandoned = True
            self.task.cancel()


@dataclass(eq=False, slots=True)
class Worker(Generic[R]):
    """One role, and what the fleet knows of it.

    Attributes:
        excused: restarts that were not its fault.
        load: tokens that it has in flight.
    """

    role: R
    state: Literal["up", "recovering", "retired"] = "up"
    restarts: int = 0
    excused: int = 0
    cause: RoleError | None = None
    load: float = 0.0
    # A mapping for its order: a set's would differ from run to run, and a simulation's with it.
    calls: dict[Call, None] = field(default_factory=dict)


class Shortlist(Generic[R]):
    """The least loaded of many workers, in logarithmic time.

    A heap of (load, tie-breaker, worker). An entry whose load is not its worker's any more is
    stale, and is thrown away when it comes up.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Worker[R]]] = []
        self._ties = itertools.count()
        self._workers = 1

    def renew(self, workers: Sequence[Worker[R]]) -> None:
        """Start from these."""
        self._workers = len(workers)
        self._heap = [(worker.load, next(self._ties), worker) for worker in workers]
        heapq.heapify(self._heap)

    def push(self, worker: Worker[R]) -> None:
        """The load of `worker` has changed, or it may be given work again."""
        heapq.heappush(self._heap, (worker.load, next(self._ties), worker))
        if len(self._heap) > 64 + 8 * self._workers:
            self.renew(list({id(w): w for _, _, w in self._heap}.values()))

    def least(
        self, usable: Callable[[Worker[R]], bool], but: Worker[R] | None = None
    ) -> Worker[R] | None:
        """The least loaded usable worker; `but` only where there is no other."""
        spared = None
        while self._heap:
            load, _, worker = self._heap[0]
            if load == worker.load and usable(worker):
                if worker is not but:
                    break
                spared = worker
            heapq.heappop(self._heap)
        best = self._heap[0][2] if self._heap else spared
        if spared is not None:
            self.push(spared)
        return best
