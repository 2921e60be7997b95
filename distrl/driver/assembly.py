"""Lockstep's meeting point between generating and scoring."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Assembly:
    """Groups wait here until none is being generated any more, and go on together, by index.

    So what a scorer reads in one pass does not depend on who finished first, and with it the last
    bits of the rewards do not; and many groups share a pass.
    """

    def __init__(self, complete: Callable[[], bool]) -> None:
        """`complete`: whether nobody is to be waited for."""
        self._complete = complete
        self._waiting: dict[int, asyncio.Future[int]] = {}

    async def join(self, index: int) -> int:
        """Wait for the others; which place this one has among all that go on now."""
        loop = asyncio.get_running_loop()
        waiting = self._waiting[index] = loop.create_future()
        loop.call_soon(self.look)  # once it waits too: a result that is there lets it pass first
        try:
            return await waiting
        finally:
            self._waiting.pop(index, None)

    def look(self) -> None:
        """Let all go on, if nobody is missing. To be called when one has come, or never will."""
        if self._waiting and self._complete():
            ready = [w for _, w in sorted(self._waiting.items()) if not w.done()]
            for place, waiting in enumerate(ready):
                waiting.set_result(place)
