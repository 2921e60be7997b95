"""A process that only passes the time, and may die."""

from __future__ import annotations

import asyncio

from distrl.roles import WorkerDied


class Process:
    """Calls in a worker that may die: each waits its time, or fails with all the others."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.waiting: dict[asyncio.Future[None], None] = {}  # in order, for the trace's sake

    async def wait(self, seconds: float | None) -> None:
        """Pass `seconds` of the loop's time; None: for ever. WorkerDied where it is dead."""
        if seconds is not None and seconds <= 0 and not self.dead:
            return
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        timer = None if seconds is None else loop.call_later(seconds, resolve, over)
        try:
            await self.wait_for(over)
        finally:
            if timer is not None:
                timer.cancel()

    async def wait_for(self, over: asyncio.Future[None]) -> None:
        """Wait until `over` is done. WorkerDied where the worker is dead, or dies."""
        if self.dead:
            raise WorkerDied(f"{self.name} is dead")
        self.waiting[over] = None
        try:
            await over
        finally:
            self.waiting.pop(over, None)

    def die(self) -> None:
        """Every call in flight fails, and every later one."""
        self.dead = True
        for over in self.waiting:
            if not over.done():
                over.set_exception(WorkerDied(f"{self.name} died with this call in flight"))


def resolve(future: asyncio.Future[None]) -> None:
    """Let whoever waits go, if somebody still does."""
    if not future.done():
        future.set_result(None)
