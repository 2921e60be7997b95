"""A virtual clock for asyncio: hours of waiting take no time, and every run is the same run.

The loop asks its selector to wait until the next timer; this selector moves the loop's clock there
instead. Callbacks run in the order in which a real loop would run them with infinitely fast code.
"""

from __future__ import annotations

import asyncio
import inspect
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_TURNS = 1_000_000


class Deadlock(RuntimeError):
    """Nothing is ready and no timer is set: nothing can ever happen again."""


class Livelock(RuntimeError):
    """The loop turned a million times and no time passed."""


class OutOfTime(RuntimeError):
    """The virtual time limit was reached."""


class LeftoverTasks(RuntimeError):
    """The main coroutine returned and left tasks behind."""


class _JumpingSelector(selectors.SelectSelector):
    """Waits by calling `jump(seconds)`."""

    jump: Callable[[float | None], None]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.jump(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time()` starts at 0 and jumps to the next timer.

    No sockets, no signals, and threads only in the form of `run_in_executor` (hence
    `asyncio.to_thread`), which runs the function at once, in no time.
    """

    def __init__(self, limit_s: float = float("inf")) -> None:
        """Raise OutOfTime beyond `limit_s` seconds of virtual time."""
        selector = _JumpingSelector()
        selector.jump = self._jump
        self._now_s = 0.0
        self._limit_s = limit_s
        self._turns = 0
        super().__init__(selector)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now_s

    def run_in_executor(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Run `func` here and now."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # whatever it raises belongs to whoever awaits it
            future.set_exception(error)
        return future

    def _jump(self, seconds: float | None) -> None:
        if seconds is None:
            waiting = sorted(map(_where, asyncio.all_tasks(self)))
            raise Deadlock(f"nothing can happen any more; waiting: {waiting}")
        if seconds > 0:
            self._turns = 0
            self._now_s += seconds
            if self._now_s > self._limit_s:
                limit_s, self._limit_s = self._limit_s, float("inf")  # the end takes time too
                raise OutOfTime(f"still running after {limit_s:g} virtual seconds")
        else:
            self._turns += 1
            if self._turns > _TURNS:
                self._turns = 0
                raise Livelock(f"{_TURNS} turns at {self._now_s:g} virtual seconds")


def run_virtual(main: Coroutine[Any, Any, T], limit_s: float = 1e6) -> T:
    """Run `main` to its end on a VirtualLoop and return its result.

    Raises what `main` raises, Deadlock, Livelock, OutOfTime, or LeftoverTasks where it leaves a
    task behind. `limit_s` counts virtual seconds.
    """
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(limit_s)) as runner:
        result = runner.run(_alone(main))
    return result


async def _alone(main: Coroutine[Any, Any, T]) -> T:
    try:
        return await main
    finally:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            raise LeftoverTasks(f"left behind: {sorted(map(_where, left))}")


def _where(task: asyncio.Task[Any] | None) -> str:
    """The coroutines that a task is inside of, outermost first."""
    names, inner = [], task and task.get_coro()
    while inspect.iscoroutine(inner):
        names.append(inner.__qualname__)
        inner = inner.cr_await
    return " > ".join(names)
