"""Actors as plain classes: what they say before they end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from distrl.actors import workers
from distrl.actors.batching import Desk
from distrl.actors.workers import ScorerActor
from distrl.roles import HeldUp, NeverScored


class Hangs:
    """A scorer: the group 1 hangs, and the others with it."""

    async def score(self, parcel: Any) -> Any:
        await asyncio.sleep(0.01)
        raise NeverScored("p1") if parcel.info == 1 else HeldUp("p1 hangs")


async def test_a_scorer_that_hangs_gives_its_answers_before_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[BaseException] = []
    monkeypatch.setattr(workers, "LAST_WORDS_S", 0.05)
    monkeypatch.setattr(workers, "_end", ended.append)
    actor: Any = object.__new__(ScorerActor)
    actor.desk, actor.scorer = Desk(), Hangs()
    await actor.take([(n, n) for n in (1, 2, 3)], [(0, 0), (0, 1), (0, 2)], ["a", "b", "c"])
    outcomes, payloads = await actor.give()
    assert not ended and not payloads
    assert [(ticket, type(error)) for ticket, error in outcomes] == [
        (1, NeverScored),
        (2, HeldUp),
        (3, HeldUp),
    ]
    await asyncio.sleep(0.2)
    assert isinstance(ended[0], HeldUp)
