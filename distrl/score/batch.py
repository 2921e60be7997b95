"""A batch that knows how far its reader is: which group a thread hangs at cannot be asked of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import overload

from distrl.records import Rollout


class Batch(Sequence[Rollout]):
    """Groups that are scored together.

    A reward that takes them one after the other is in the middle of going through them; one that
    reads all at once has gone through them by then.
    """

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self._rollouts = rollouts
        self._present: int | None = None
        self._since = time.monotonic()

    def still_s(self) -> float:
        """Seconds since anybody last went on to another group, or since it was made."""
        return time.monotonic() - self._since

    def present(self) -> int | None:
        """Place of the group that is being read; where there is one alone, its. None: all are."""
        return 0 if len(self) == 1 else self._present

    def __iter__(self) -> Iterator[Rollout]:
        try:
            for place, rollout in enumerate(self._rollouts):
                self._present, self._since = place, time.monotonic()
                yield rollout
        finally:
            self._present, self._since = None, time.monotonic()

    @overload
    def __getitem__(self, place: int) -> Rollout: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Rollout]: ...

    def __getitem__(self, place: int | slice) -> Rollout | Sequence[Rollout]:
        return self._rollouts[place]

    def __len__(self) -> int:
        return len(self._rollouts)
