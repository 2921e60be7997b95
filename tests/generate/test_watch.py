"""An engine that has work and is silent is missed in time, and no other is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from distrl.generate.watch import LOOK_S, Watch
from distrl.sim import run_virtual

LIMIT_S = 600.0


class Engine:
    """As a watch sees it."""

    def __init__(self) -> None:
        self.requests = 0
        self.watch = Watch(LIMIT_S, lambda: self.requests > 0)


def missed_after(life: Callable[[Engine], Coroutine[Any, Any, None]]) -> float | None:
    """Seconds until an engine that lives so is missed; None: it never is, in its life."""

    async def main() -> None:
        engine = Engine()
        living = asyncio.ensure_future(life(engine))
        silence = asyncio.ensure_future(engine.watch.silence())
        await asyncio.wait({living, silence}, return_when=asyncio.FIRST_COMPLETED)
        if silence.done():
            missed.append(asyncio.get_running_loop().time())
        for task in (living, silence):
            task.cancel()
        await asyncio.wait({living, silence})

    missed: list[float] = []
    run_virtual(main())
    return missed[0] if missed else None


async def stands_still(engine: Engine) -> None:
    engine.requests = 1
    await asyncio.sleep(1e6)


async def token_by_token(engine: Engine) -> None:
    """A request as slow as one can be."""
    engine.requests = 1
    for _ in range(20):
        await asyncio.sleep(LIMIT_S - 1)
        engine.watch.heard()


async def idle(engine: Engine) -> None:
    await asyncio.sleep(1e5)


async def retried(engine: Engine) -> None:
    """It stood still in the midst of a group, which is lost at its own deadline and asked for
    again."""
    engine.requests = 1
    await asyncio.sleep(20)
    engine.watch.heard()
    await asyncio.sleep(LIMIT_S - 20)
    engine.requests = 0
    await asyncio.sleep(0.1)
    await stands_still(engine)


async def pauses(engine: Engine) -> None:
    """Some seconds of work that came to nothing, and hours of idleness."""
    for _ in range(5):
        engine.requests = 1
        await asyncio.sleep(LIMIT_S / 6)
        engine.requests = 0
        await asyncio.sleep(1e4)


def test_an_engine_that_stands_still_is_missed_when_its_time_is_over():
    missed = missed_after(stands_still)
    assert missed is not None and LIMIT_S <= missed <= LIMIT_S + 2 * LOOK_S


def test_a_slow_engine_and_an_idle_one_are_never_missed():
    assert missed_after(token_by_token) is None
    assert missed_after(idle) is None
    assert missed_after(pauses) is None


def test_a_lost_request_does_not_begin_the_count_anew():
    missed = missed_after(retried)
    assert missed is not None and missed <= 20 + LIMIT_S + 4 * LOOK_S
