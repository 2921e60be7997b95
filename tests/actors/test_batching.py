"""Counter and desk without Ray: batches out, each its own answer back, whatever happens."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest

from distrl.actors.batching import Counter, Desk, Piece, packed, unpacked
from distrl.roles import RoleError, WorkerDied


class Reference:
    """Stands for an object reference: awaited, it gives what the call came to."""

    def __init__(self, work: Any) -> None:
        self.task = asyncio.ensure_future(work)

    def __await__(self) -> Any:
        return self.task.__await__()


class Actor:
    """A desk behind calls as Ray makes them; `job` says what becomes of a question."""

    def __init__(self, job: Any) -> None:
        self.desk, self.job, self.calls, self.dead = Desk(), job, [], False
        self.take = SimpleNamespace(remote=lambda batch: Reference(self._take(batch)))
        self.give = SimpleNamespace(remote=self._give)
        self.drop = SimpleNamespace(remote=self.desk.drop)
        self.died = asyncio.Event()

    async def _take(self, batch: Any) -> None:
        self.calls.append(len(batch))
        for ticket, question in batch:
            self.desk.take(ticket, self.job(question))

    def _give(self) -> tuple[Reference, Reference]:
        both = asyncio.ensure_future(self._given())

        async def part(place: int) -> Any:
            return (await both)[place]

        outcomes, payloads = Reference(part(0)), Reference(part(1))
        # Of an actor that died nobody looks at the payloads, and Ray does not mind.
        payloads.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return outcomes, payloads

    async def _given(self) -> Any:
        giving = asyncio.ensure_future(self.desk.give())
        dying = asyncio.ensure_future(self.died.wait())
        await asyncio.wait({giving, dying}, return_when=asyncio.FIRST_COMPLETED)
        dying.cancel()
        if not giving.done():
            giving.cancel()
            raise WorkerDied("gone")
        return giving.result()

    def counter(self) -> Counter:
        async def alive(reference: Any) -> Any:
            return await reference

        return Counter(self, lambda batch: alive(self.take.remote(batch)), alive)


async def doubled(question: int) -> tuple[int, str]:
    await asyncio.sleep(random.Random(question).uniform(0, 0.02))
    if question % 7 == 3:
        raise RoleError(f"no answer to {question}")
    return 2 * question, f"payload of {question}"


async def test_each_gets_its_own_answer_in_few_calls() -> None:
    actor = Actor(doubled)
    counter = actor.counter()
    asked = [counter.ask(n) for n in range(200)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    for n, answer in enumerate(answers):
        if n % 7 == 3:
            assert isinstance(answer, RoleError) and str(answer) == f"no answer to {n}"
            assert "in the actor" in answer.__notes__[0]
        else:
            assert not isinstance(answer, BaseException)
            assert answer.info == 2 * n and await answer.payload == f"payload of {n}"
    assert actor.calls == [200], "what is asked in one turn leaves in one call"
    again = await counter.ask(1)
    assert again.info == 2 and actor.calls == [200, 1]


async def test_a_death_is_told_to_all_who_wait() -> None:
    async def forever(question: int) -> Any:
        await asyncio.sleep(100)

    actor = Actor(forever)
    counter = actor.counter()
    waiting = [asyncio.ensure_future(counter.ask(n)) for n in range(3)]
    await asyncio.sleep(0.01)
    actor.died.set()
    for answer in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(answer, WorkerDied)


async def test_who_gives_up_waiting_ends_the_job() -> None:
    ended: list[int] = []

    async def job(question: int) -> Any:
        try:
            await asyncio.sleep(100 if question == 1 else 0.02)
        except asyncio.CancelledError:
            ended.append(question)
            raise
        return question, None

    counter = Actor(job).counter()
    keeps, gives_up = (asyncio.ensure_future(counter.ask(n)) for n in (0, 1))
    await asyncio.sleep(0.005)
    gives_up.cancel()
    assert (await keeps).info == 0
    with pytest.raises(asyncio.CancelledError):
        await gives_up
    assert ended == [1]


async def test_a_question_that_is_taken_back_at_once_is_not_asked() -> None:
    """Else the actor would be told to drop what it is given only then, and do it for nobody."""
    actor = Actor(doubled)
    sent: set[int] = set()
    dropped: list[int] = []

    def take(batch: Any) -> Reference:
        sent.update(ticket for ticket, _ in batch)
        return Reference(actor._take(batch))

    def drop(ticket: int) -> None:
        assert ticket in sent
        dropped.append(ticket)

    actor.take, actor.drop = SimpleNamespace(remote=take), SimpleNamespace(remote=drop)
    counter = actor.counter()
    for turns in range(6):
        dropped.clear()
        back, kept = (asyncio.ensure_future(counter.ask(n)) for n in (0, 1))
        for _ in range(turns):
            await asyncio.sleep(0)
        back.cancel()
        assert (await kept).info == 2
        with pytest.raises(asyncio.CancelledError):
            await back
        assert actor.calls.pop() == 1 + len(dropped), turns
    assert len(dropped) == 1 and not actor.calls


async def test_a_call_that_cannot_be_sent_fails_those_it_carried() -> None:
    actor = Actor(doubled)

    async def refused(batch: Any) -> None:
        raise TypeError("cannot be pickled")

    async def alive(reference: Any) -> Any:
        return await reference

    counter = Counter(actor, refused, alive)
    with pytest.raises(TypeError, match="pickled"):
        await counter.ask(1)
    counter.close()


def test_pieces_name_each_batch_once() -> None:
    batches = {"a": ["a0", "a1"], "b": ["b0"]}
    pieces = [Piece("b", 0), Piece("a", 1), Piece("a", 0)]
    where, references = packed(pieces)
    assert references == ["b", "a"]
    assert unpacked(where, [batches[r] for r in references]) == ["b0", "a1", "a0"]
