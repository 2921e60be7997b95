"""Whether an engine that has work does any of it.

An engine may stand still without being dead: its process was stopped, its GPU hangs. Each request
then ends at its own deadline, and one that is tried again there does so too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

LOOK_S = 0.5
"""Seconds between looks."""


class Watch:
    """Counts the seconds in which an engine has work and gives nothing out."""

    def __init__(self, limit_s: float, has_work: Callable[[], bool]) -> None:
        """`has_work`: whether the engine should be doing something now."""
        self.limit_s, self._has_work = limit_s, has_work
        self._heard = False

    def heard(self) -> None:
        """The engine gave something out, be it a single token."""
        self._heard = True

    async def silence(self) -> None:
        """Return once the engine has given out nothing in `limit_s` seconds of work.

        Seconds without work are not counted, and are no sign of life: those before them stay
        counted. Looks are counted, not the clock: this process may have been stopped itself.
        """
        silent_s = 0.0
        while silent_s < self.limit_s:
            await asyncio.sleep(LOOK_S)
            if self._heard:
                silent_s, self._heard = 0.0, False
            elif self._has_work():
                silent_s += LOOK_S
