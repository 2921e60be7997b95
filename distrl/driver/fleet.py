"""A fleet: interchangeable workers of one role, least-loaded dispatch, restarts, retirement.

Invariant: a call that `do` was given ends exactly once, with a result or with GroupLost. A worker
that was condemned (its process died, or it would not take on the weights) has every call in flight
abandoned: whatever the old process might still deliver is never looked at.

A worker is *up*, *recovering* (one task restarts it, at most `max_restarts` times in a run) or
*retired*. When the last one retires, FleetExhausted ends the run and names every cause.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

from distrl.driver.errors import FleetExhausted
from distrl.roles import RoleError, WorkerDied


class Role(Protocol):
    """What every role of a fleet can do."""

    @property
    def name(self) -> str: ...

    async def restart(self) -> None: ...


R = TypeVar("R", bound=Role)
T = TypeVar("T")
Spawn = Callable[[Coroutine[Any, Any, None]], object]


class GroupLost(Exception):
    """Every try at a group failed; the message is the reason."""


class Abandoned(RoleError):
    """The worker was condemned while the call was in flight."""


@dataclass(eq=False, slots=True)
class Worker(Generic[R]):
    """One role, and what the fleet knows of it."""

    role: R
    state: Literal["up", "recovering", "retired"] = "up"
    restarts: int = 0
    cause: RoleError | None = None
    calls: set[asyncio.Task[Any]] = field(default_factory=set)


class Fleet(Generic[R]):
    """Workers of one role."""

    def __init__(
        self, kind: str, roles: Sequence[R], *, max_restarts: int, tries: int, spawn: Spawn
    ) -> None:
        """`spawn` starts a background task whose exception ends the run."""
        if not roles:
            raise ValueError(f"a run needs at least one {kind}")
        self.workers = [Worker(role) for role in roles]
        self.retries = 0
        self._kind = kind
        self._max_restarts = max_restarts
        self._tries = tries
        self._spawn = spawn
        self._closed = False
        self._changed = asyncio.Event()

    @property
    def restarts(self) -> int:
        """Restarts of all workers so far."""
        return sum(worker.restarts for worker in self.workers)

    def usable(self) -> list[Worker[R]]:
        """The workers that may be given work."""
        return [worker for worker in self.workers if self.is_usable(worker)]

    def is_usable(self, worker: Worker[R]) -> bool:
        return worker.state == "up"

    async def do(
        self,
        work: Callable[[R], Coroutine[Any, Any, T]],
        *,
        holder: Callable[[str], None],
        first: Worker[R] | None = None,
    ) -> T:
        """Run `work` on the least loaded worker, then on others while RoleError is raised.

        `first` is asked first where it is usable; `holder` is told who has the work. Raises
        GroupLost after `tries` failures; other exceptions of `work` pass through.
        """
        errors: list[RoleError] = []
        worker = first
        while len(errors) < self._tries:
            if worker is None or errors or not self.is_usable(worker):
                holder(f"nobody: no {self._kind} is ready")
                worker = await self._least_loaded(but=worker)
            holder(worker.role.name)
            self.retries += bool(errors)
            try:
                return await self.call(worker, work(worker.role))
            except RoleError as error:
                errors.append(error)
        raise GroupLost(f"{self._kind}: {type(errors[-1]).__name__}: {errors[-1]}") from errors[-1]

    async def call(self, worker: Worker[R], work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on `worker`. WorkerDied condemns it; Abandoned where another call did."""
        incarnation = worker.restarts
        task = asyncio.get_running_loop().create_task(work)
        worker.calls.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if _being_cancelled():
                raise
            raise Abandoned(f"{worker.role.name} was given up: {worker.cause}") from None
        except WorkerDied as error:
            if worker.restarts == incarnation:
                self.condemn(worker, error)
            raise
        finally:
            worker.calls.discard(task)

    def condemn(self, worker: Worker[R], cause: RoleError) -> None:
        """Take a worker out of service, abandon its calls, and start its recovery."""
        if worker.state != "up":
            return
        worker.state = "recovering"
        self.abandon(worker, cause)
        if not self._closed:
            self._spawn(self._recover(worker))

    def abandon(self, worker: Worker[R], cause: RoleError) -> None:
        """Give up every call that `worker` has in flight; each goes to another try."""
        worker.cause = cause
        for task in worker.calls:
            task.cancel()

    def close(self) -> None:
        """The run is ending: a worker that dies now is nobody's loss."""
        self._closed = True

    def describe(self) -> str:
        """One line a worker: state, calls in flight, restarts, last trouble."""
        return "\n".join(
            f"  {w.role.name}: {w.state}, {len(w.calls)} calls in flight, {w.restarts} restarts"
            + (f", last trouble: {w.cause!r}" if w.cause else "")
            for w in self.workers
        )

    async def prepare(self, worker: Worker[R]) -> None:
        """What a restarted worker must do before it is given work. Raises RoleError."""

    async def _least_loaded(self, but: Worker[R] | None) -> Worker[R]:
        """The usable worker with the fewest calls; `but` only where there is no other."""
        while not (usable := self.usable()):
            self._changed.clear()
            await self._changed.wait()
        return min(usable, key=lambda worker: (worker is but, len(worker.calls)))

    async def _recover(self, worker: Worker[R]) -> None:
        while worker.restarts < self._max_restarts:
            worker.restarts += 1
            try:
                await worker.role.restart()
                await self.prepare(worker)
            except RoleError as error:
                worker.cause = error
                continue
            worker.state = "up"
            self._changed.set()
            return
        worker.state = "retired"
        if not self._closed and all(other.state == "retired" for other in self.workers):
            raise FleetExhausted(
                f"no {self._kind} is left: each used up driver.max_restarts={self._max_restarts}\n"
                + self.describe()
            ) from worker.cause


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
