"""Many groups in one call: Ray's rate of calls then bounds batches, not groups.

    Counter (driver's side)    what is asked for in one turn of the event loop leaves in one
                               `take` call; one `give` call at a time waits for what has ended
    Desk (actor's side)        each job is a task of its own; `give` answers with all that ended
                               since the last one: metadata by value, payloads as one object

A payload is a `Piece`: a reference to such an object, and a place in it. It is handed on as it
is, so tokens never pass through the driver.
"""

from __future__ import annotations

import asyncio
import itertools
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.exceptions import ObjectLostError, RayTaskError

from distrl.records import GroupInfo, Parcel, ScoredInfo
from distrl.roles import PayloadLost

Info = TypeVar("Info", bound=GroupInfo | ScoredInfo)
Outcomes = list[tuple[int, Any]]
"""(ticket, metadata or exception) of jobs that ended."""


def lost(who: str, error: BaseException) -> PayloadLost:
    """That the object store has not got any more what `who` asked for. Payloads beyond some 100 kB
    lie on the machine of the actor that gave them."""
    cause = error.cause if isinstance(error, RayTaskError) else error  # Ray's own is a traceback
    said = str(cause).strip().splitlines()[0]
    return PayloadLost(f"{who}: a payload is lost with the machine that held it: {said}")


@dataclass(frozen=True, slots=True)
class Piece:
    """A payload behind a reference to several; `await` fetches it. Raises PayloadLost."""

    batch: Any
    place: int

    def __await__(self) -> Generator[Any, Any, Any]:
        try:
            whole = yield from self.batch.__await__()
        except ObjectLostError as error:
            raise lost("the driver", error) from error
        return whole[self.place]


def packed(pieces: Iterable[Piece]) -> tuple[list[tuple[int, int]], list[Any]]:
    """Each piece as (number of its batch, place in it), and the batches' references, once each.

    References are given to an actor as arguments of their own, for Ray fetches only those.
    """
    batches: dict[Any, int] = {}
    where = [(batches.setdefault(p.batch, len(batches)), p.place) for p in pieces]
    return where, list(batches)


def unpacked(where: Sequence[tuple[int, int]], batches: Sequence[Sequence[Any]]) -> list[Any]:
    """The payloads that `packed` spoke of."""
    return [batches[number][place] for number, place in where]


class Desk:
    """Jobs under way in an actor, and what has ended and was not fetched yet."""

    def __init__(self) -> None:
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._ended: list[tuple[int, Any, Any]] = []
        self._some = asyncio.Event()

    def take(self, ticket: int, job: Coroutine[Any, Any, tuple[Any, Any]]) -> None:
        """Begin a job, which comes to (metadata, payload)."""
        task = self._tasks[ticket] = asyncio.create_task(self._do(ticket, job))
        task.add_done_callback(lambda _: self._tasks.pop(ticket))

    async def give(self) -> tuple[Outcomes, list[Any]]:
        """Wait until something has ended; its outcomes, and the payloads of those that
        succeeded, in order."""
        while not self._ended:
            self._some.clear()
            await self._some.wait()
        ended, self._ended = self._ended, []
        outcomes = [(ticket, outcome) for ticket, outcome, _ in ended]
        good = [payload for _, outcome, payload in ended if not isinstance(outcome, Exception)]
        return outcomes, good

    def drop(self, ticket: int) -> None:
        """Nobody waits for a job any more."""
        if (task := self._tasks.get(ticket)) is not None:
            task.cancel()

    async def _do(self, ticket: int, job: Coroutine[Any, Any, tuple[Any, Any]]) -> None:
        try:
            outcome, payload = await job
        except Exception as error:  # whatever it is, it belongs to whoever asked
            error.add_note(f"in the actor:\n{traceback.format_exc()}")
            outcome, payload = error, None
        self._ended.append((ticket, outcome, payload))
        self._some.set()


class Counter:
    """The driver's side of one actor: asks in batches, and hands each its own answer."""

    def __init__(
        self,
        actor: Any,
        take: Callable[[Sequence[tuple[int, Any]]], Awaitable[Any]],
        alive: Callable[[Any], Awaitable[Any]],
    ) -> None:
        """`take` sends (ticket, question) pairs to the actor; `alive` awaits a call to it and
        raises WorkerDied where it is gone."""
        self._actor, self._take, self._alive = actor, take, alive
        self._tickets = itertools.count()
        self._outbox: dict[int, Any] = {}
        self._waiting: dict[int, asyncio.Future[Parcel[Any]]] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._collecting = False

    async def ask(self, question: Any) -> Parcel[Any]:
        """The answer to one question. Raises what the actor raised, or WorkerDied."""
        loop, ticket = asyncio.get_running_loop(), next(self._tickets)
        answer: asyncio.Future[Parcel[Any]] = loop.create_future()
        self._waiting[ticket] = answer
        self._outbox[ticket] = question
        if len(self._outbox) == 1:
            loop.call_soon(self._send)
        try:
            return await answer
        except asyncio.CancelledError:
            if ticket in self._outbox:
                del self._outbox[ticket]
            else:
                self._actor.drop.remote(ticket)  # behind the `take` that brought it, in order
            raise
        finally:
            self._waiting.pop(ticket, None)

    def close(self) -> None:
        """The actor is going."""
        for task in self._running:
            task.cancel()

    def _send(self) -> None:
        self._run(self._deliver())
        if not self._collecting:
            self._collecting = True
            self._run(self._collect())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _deliver(self) -> None:
        batch, self._outbox = list(self._outbox.items()), {}
        if not batch:  # they were all taken back, or have left with others
            return
        try:
            await self._take(batch)
        except Exception as error:  # those who asked must hear of it, whatever it is
            self._fail([ticket for ticket, _ in batch], error)

    async def _collect(self) -> None:
        try:
            while self._waiting:
                outcomes, payloads = self._actor.give.remote()
                self._hand_out(await self._alive(outcomes), payloads)
        except Exception as error:  # likewise
            self._fail(list(self._waiting), error)
        finally:
            self._collecting = False

    def _hand_out(self, outcomes: Outcomes, payloads: Any) -> None:
        places = itertools.count()
        for ticket, outcome in outcomes:
            failed = isinstance(outcome, Exception)
            place = None if failed else next(places)
            answer = self._waiting.pop(ticket, None)
            if answer is None or answer.done():
                continue
            if failed:
                answer.set_exception(outcome)
            else:
                assert place is not None
                answer.set_result(Parcel(info=outcome, payload=Piece(payloads, place)))

    def _fail(self, tickets: Iterable[int], error: Exception) -> None:
        for ticket in tickets:
            answer = self._waiting.pop(ticket, None)
            if answer is not None and not answer.done():
                answer.set_exception(error)
