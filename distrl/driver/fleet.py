"""A fleet: interchangeable workers of one role, least-loaded dispatch, restarts, retirement.

Load is counted in tokens: what a worker has in flight, as far as its callers can tell.

Invariant: a call that `do` was given ends exactly once, with a result or with GroupLost. A worker
that was condemned (its process died, or it would not take on the weights) has every call in flight
abandoned: whatever the old process might still deliver is never looked at.

A worker is *up*, *recovering* (one task restarts it, at most `max_restarts` times in a run, those
not counted that a piece of work made necessary, which is given up for it) or *retired*. When the
last one retires, FleetExhausted ends the run and names every cause. Workers may join a running
fleet, and leave it: one that leaves ends what it has in flight.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, Protocol, TypeVar

from distrl.driver.errors import FleetExhausted
from distrl.driver.worker import Call, R, Shortlist, Worker
from distrl.roles import HeldUp, NeverScored, PayloadLost, RoleError, WorkerDied

T = TypeVar("T")
Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
Note = Callable[[str, str, str], None]
"""Told of a worker's life: its name, what befell it, why."""


class GroupLost(Exception):
    """Every try at a group failed; the message is the reason."""


class Abandoned(RoleError):
    """The worker was condemned while the call was in flight."""


class Witness(Protocol):
    """Who wants to know how a piece of work goes."""

    def waits(self, why: str) -> None:
        """Nobody has it now."""
        ...

    def held_by(self, worker: Worker[Any]) -> None:
        """`worker` has it now."""
        ...

    def failed(self, name: str, error: RoleError) -> None:
        """`name` failed at it; another try follows."""
        ...


class Fleet(Generic[R]):
    """Workers of one role.

    Attributes:
        tries: how often a piece of work is tried.
        retries: tries so far that were not the first.
    """

    def __init__(
        self,
        kind: str,
        roles: Sequence[R],
        *,
        max_restarts: int,
        tries: int,
        spawn: Spawn,
        note: Note = lambda who, what, why: None,
    ) -> None:
        """`spawn` starts a background task whose exception ends the run."""
        if not roles:
            raise ValueError(f"a run needs at least one {kind}")
        self.workers = [Worker(role) for role in roles]
        self.retries = 0
        self._kind = kind
        self._max_restarts = max_restarts
        self.tries = tries
        self._spawn = spawn
        self._note = note
        self._closed = False
        self._changed = asyncio.Event()
        self._shortlist: Shortlist[R] = Shortlist()
        self._shortlist.renew(self.workers)

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
        witness: Witness,
        load: float = 1.0,
        first: Worker[R] | None = None,
    ) -> T:
        """Run `work` on the least loaded worker, then on others while RoleError is raised.

        `load` is what the work adds to a worker's; `first` is asked first where it is usable.
        Raises GroupLost after `tries` failures, or NeverScored; PayloadLost, which no other worker
        could mend, and other exceptions of `work` pass through.
        """
        worker = first
        for left in reversed(range(self.tries)):
            if worker is None or worker is not first or not self.is_usable(worker):
                witness.waits(f"nobody: no {self._kind} is ready")
                worker = await self._least_loaded(but=worker)
            first = None
            witness.held_by(worker)
            try:
                return await self._loaded_with(load, worker, work(worker.role))
            except PayloadLost:
                raise
            except RoleError as error:
                if not left or isinstance(error, NeverScored):
                    reason = f"{self._kind}: {type(error).__name__}: {error}"
                    raise GroupLost(reason) from error
                self.retries += 1
                witness.failed(worker.role.name, error)
        raise AssertionError("tries is at least 1")

    async def _loaded_with(self, load: float, worker: Worker[R], work: Coroutine[Any, Any, T]) -> T:
        worker.load += load
        self._shortlist.push(worker)
        try:
            return await self.call(worker, work)
        finally:
            worker.load -= load
            self._shortlist.push(worker)

    async def call(self, worker: Worker[R], work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on `worker`. WorkerDied condemns it; Abandoned where another call did."""
        mine = Call(_current_task())
        incarnation = worker.restarts
        worker.calls[mine] = None
        try:
            return await work
        except asyncio.CancelledError:
            if not mine.abandoned or mine.task.cancelling() > 1:  # cancelled by somebody else
                raise
            raise Abandoned(f"{worker.role.name} was given up: {worker.cause}") from None
        except WorkerDied as error:
            del worker.calls[mine]  # or it would abandon itself
            if worker.restarts == incarnation:
                self.condemn(worker, error)
            raise
        finally:
            worker.calls.pop(mine, None)
            if mine.abandoned:
                mine.task.uncancel()

    def condemn(self, worker: Worker[R], cause: RoleError) -> None:
        """Take a worker out of service, abandon its calls, and start its recovery."""
        if worker.state != "up":
            if worker.state == "retired":  # it has left, and is not to come back
                self.abandon(worker, cause)
            return
        worker.state = "recovering"
        worker.excused += isinstance(cause, HeldUp)
        self._note(worker.role.name, "lost", str(cause))
        self.abandon(worker, cause)
        if not self._closed:
            self._spawn(self._recover(worker))

    def abandon(self, worker: Worker[R], cause: RoleError) -> None:
        """Give up every call that `worker` has in flight; each goes to another try."""
        worker.cause = cause
        for call in worker.calls:
            call.abandon()

    def join(self, role: R) -> None:
        """A worker more: it is given work as soon as it is prepared. It must be started."""
        if any(w.role.name == role.name and w.state != "retired" for w in self.workers):
            raise ValueError(f"there is a {self._kind} {role.name} already")
        worker = Worker(role, state="recovering")
        self.workers.append(worker)
        self._note(role.name, "joined", "")
        self._spawn(self._welcome(worker))

    def leave(self, name: str) -> None:
        """A worker less: it gets no new work, and ends what it has in flight.

        Raises ValueError where no worker of that name is up, or no other one is.
        """
        up = {worker.role.name: worker for worker in self.workers if worker.state == "up"}
        if name not in up:
            raise ValueError(f"no {self._kind} {name} is up; there are: {', '.join(up) or 'none'}")
        if len(up) == 1:
            raise ValueError(f"{name} is the last {self._kind} that is up; let another join first")
        up[name].state = "retired"
        self._note(name, "left", "")

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
        """The usable worker with the least load; `but` only where there is no other."""
        while (worker := self._shortlist.least(self.is_usable, but)) is None:
            self._changed.clear()
            await self._changed.wait()
        return worker

    def _may_be_usable(self, worker: Worker[R]) -> None:
        """Let it be found by those who look for a worker."""
        self._shortlist.push(worker)
        self._changed.set()

    async def _welcome(self, worker: Worker[R]) -> None:
        try:
            await self.prepare(worker)
        except RoleError as error:
            worker.cause = error
            await self._recover(worker)
            return
        worker.state = "up"
        self._may_be_usable(worker)

    async def _recover(self, worker: Worker[R]) -> None:
        while worker.restarts - worker.excused < self._max_restarts:
            worker.restarts += 1
            try:
                await worker.role.restart()
                await self.prepare(worker)
            except RoleError as error:
                worker.cause = error
                continue
            worker.state = "up"
            self._note(worker.role.name, "up", f"restart {worker.restarts}")
            self._may_be_usable(worker)
            return
        worker.state = "retired"
        self._note(worker.role.name, "retired", str(worker.cause))
        if not self._closed and all(other.state == "retired" for other in self.workers):
            raise FleetExhausted(
                f"no {self._kind} is left: each used up driver.max_restarts={self._max_restarts}\n"
                + self.describe()
            ) from worker.cause


def _current_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task
