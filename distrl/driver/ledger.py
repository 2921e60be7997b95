"""The ledger: what became of every prompt, noted on the hot path and written off it.

    issued → generated → scored → admitted → trained → committed        or dropped, with a reason

Noting something costs a few attribute writes. Once a second, and before every checkpoint, all
that changed is written in one transaction by another thread (`ledger_file.py` has the tables).

Invariant: an index has at most one open attempt. `flush` writes all that was noted before it was
called. A checkpoint is committed only after a flush (`learn.py`), so no committed checkpoint
knows of a training that the ledger does not. What a crash leaves beyond the newest checkpoint is
rolled back when the run is resumed, and tried again as the next attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from distrl.driver.ledger_file import LedgerFile
from distrl.records import GroupInfo, Prompt, ScoredInfo, VersionSpan

FLUSH_S = 1.0
"""Seconds between writes."""

Rows = dict[str, list[Sequence[Any]]]


class Ledger:
    """Notes nothing: the ledger of a run that keeps none."""

    run_id: str | None = None

    def issued(self, prompt: Prompt) -> None:
        """A prompt was admitted: an attempt begins."""

    def generated(self, info: GroupInfo) -> None:
        """The group of an open attempt was generated."""

    def scored(self, info: ScoredInfo) -> None:
        """It was scored."""

    def admitted(self, index: int) -> None:
        """It landed in the buffer."""

    def failed(self, index: int, reason: str) -> None:
        """The attempt came to nothing, and the next one begins."""

    def dropped(self, index: int, reason: str) -> None:
        """The prompt was given up; nothing more is tried."""

    def trained(self, step: Step, indices: Iterable[int], masked: Iterable[int]) -> None:
        """A learner step was taken on these groups; `masked`: tokens of each left out as stale."""

    def committed(self, step: int, cursor: int) -> None:
        """A checkpoint of `step` is committed; below `cursor` all is settled."""

    def event(self, who: str, what: str, detail: str = "") -> None:
        """Something befell a worker, or the learner, or the bound."""

    async def flush(self) -> None:
        """Everything noted so far is on disk when this returns."""

    async def keep(self) -> None:
        """Flush for ever."""

    def close(self) -> None:
        """The run is over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One learner step: versions before and after it, and the staleness bound it was held to."""

    number: int
    version: int
    version_after: int
    bound: int


@dataclass(slots=True)
class _Attempt:
    """One try at a prompt, filled in as it goes on. `kept`: its samples are written."""

    prompt: Prompt
    number: int
    issued_s: float
    group: GroupInfo | None = None
    generated_s: float | None = None
    score: ScoredInfo | None = None
    scored_s: float | None = None
    admitted_s: float | None = None
    ended_s: float | None = None
    ended: str | None = None
    reason: str | None = None
    kept: bool = False

    def samples_due(self) -> bool:
        """Whether its samples are to be written now: once, as soon as nothing more comes."""
        return not self.kept and (self.score is not None or self.ended is not None)


class FileLedger(Ledger):
    """Keeps the ledger in a `LedgerFile`. All but `flush` must be called in one thread."""

    def __init__(
        self, file: LedgerFile, clock: Callable[[], float], *, offset_s: float = 0.0
    ) -> None:
        """`offset_s` is added to `clock` to make it seconds since 1970."""
        self.run_id = file.run_id
        self._file = file
        self._clock = clock
        self._offset_s = offset_s
        self._before = file.attempts()
        self._open: dict[int, _Attempt] = {}
        self._changed: dict[int, _Attempt] = {}
        self._ended: list[_Attempt] = []
        self._rows: Rows = {}
        self._writing = asyncio.Lock()

    def issued(self, prompt: Prompt) -> None:
        self._begin(prompt, self._before.pop(prompt.index, 0) + 1)

    def generated(self, info: GroupInfo) -> None:
        attempt = self._touch(info.index)
        attempt.group, attempt.generated_s = info, self._now()

    def scored(self, info: ScoredInfo) -> None:
        attempt = self._touch(info.group.index)
        attempt.score, attempt.scored_s = info, self._now()

    def admitted(self, index: int) -> None:
        self._touch(index).admitted_s = self._now()

    def failed(self, index: int, reason: str) -> None:
        attempt = self._end(index, "failed", reason)
        self._begin(attempt.prompt, attempt.number + 1)

    def dropped(self, index: int, reason: str) -> None:
        self._end(index, "dropped", reason)

    def trained(self, step: Step, indices: Iterable[int], masked: Iterable[int]) -> None:
        for index, left_out in zip(indices, masked, strict=True):
            number = self._end(index, "trained", None).number
            self._row("trainings", (step.number, index, number, left_out, None))
        versions = (step.version, step.version_after, step.bound)
        self._row("steps", (step.number, self._file.fence, *versions, self._now(), None))

    def committed(self, step: int, cursor: int) -> None:
        self._row("checkpoints", (step, cursor, self._file.fence, self._now(), None))

    def event(self, who: str, what: str, detail: str = "") -> None:
        self._row("events", (self._file.fence, self._now(), who, what, detail))

    async def flush(self) -> None:
        """Raises LedgerError."""
        async with self._writing:
            writing = asyncio.ensure_future(asyncio.to_thread(self._write, *self._gather()))
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                await asyncio.wait({writing})  # the file is its thread's until that is done
                if (error := writing.exception()) is not None:
                    raise error from None
                raise

    async def keep(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()

    def close(self) -> None:
        """Write what is left, and let others write. Raises LedgerError."""
        try:
            self._write(*self._gather())
        finally:
            self._file.close()

    def _gather(self) -> tuple[list[tuple[_Attempt, tuple[Any, ...]]], Rows]:
        """All that has changed since the last write."""
        attempts = [*self._ended, *self._changed.values()]
        rows, self._rows = self._rows, {}
        self._changed, self._ended = {}, []
        return [(a, _columns(a, self._file.fence)) for a in attempts], rows

    def _write(self, attempts: list[tuple[_Attempt, tuple[Any, ...]]], rows: Rows) -> None:
        due = [attempt for attempt, _ in attempts if attempt.samples_due()]
        samples = (row for attempt in due for row in _samples(attempt))
        self._file.write({"attempts": (row for _, row in attempts), "samples": samples, **rows})
        for attempt in due:
            attempt.kept = True

    def _begin(self, prompt: Prompt, number: int) -> None:
        attempt = _Attempt(prompt, number, self._now())
        self._open[prompt.index] = self._changed[prompt.index] = attempt

    def _touch(self, index: int) -> _Attempt:
        attempt = self._changed[index] = self._open[index]
        return attempt

    def _end(self, index: int, ended: str, reason: str | None) -> _Attempt:
        attempt = self._open.pop(index)
        self._changed.pop(index, None)
        attempt.ended_s, attempt.ended, attempt.reason = self._now(), ended, reason
        self._ended.append(attempt)
        return attempt

    def _row(self, table: str, row: Sequence[Any]) -> None:
        self._rows.setdefault(table, []).append(row)

    def _now(self) -> float:
        return self._clock() + self._offset_s


def _columns(attempt: _Attempt, fence: int) -> tuple[Any, ...]:
    """The row of an attempt as it is now."""
    prompt, group, score = attempt.prompt, attempt.group, attempt.score
    made = (None,) * 3 if group is None else (group.generator, group.seed, group.seconds)
    judged = (None,) * 2 if score is None else (score.scorer, score.seconds)
    return (
        prompt.index,
        attempt.number,
        fence,
        prompt.epoch,
        prompt.prompt_id,
        attempt.issued_s,
        made[0],
        made[1],
        attempt.generated_s,
        made[2],
        judged[0],
        attempt.scored_s,
        judged[1],
        attempt.admitted_s,
        None if group is None else group.nbytes,
        attempt.ended_s,
        attempt.ended,
        attempt.reason,
        None,
    )


def _samples(attempt: _Attempt) -> list[tuple[Any, ...]]:
    """The rows of an attempt's samples; none before it was generated."""
    group, score = attempt.group, attempt.score
    if group is None:
        return []
    key = (attempt.prompt.index, attempt.number)
    count = len(group.lengths)
    rewards = (None,) * count if score is None else score.rewards
    return [
        (
            *key,
            place,
            group.lengths[place],
            group.finish_reasons[place],
            spans_text(group.spans[place]),
            rewards[place],
            "" if score is None else _parts(score, place),
        )
        for place in range(count)
    ]


def spans_text(spans: Sequence[VersionSpan]) -> str:
    """Version spans as text: "3:0-17 4:17-40"."""
    return " ".join([f"{span.version}:{span.start}-{span.end}" for span in spans])


def spans_of(text: str) -> tuple[VersionSpan, ...]:
    """What `spans_text` was made of."""
    spans = []
    for part in text.split():
        version, _, places = part.partition(":")
        start, _, end = places.partition("-")
        spans.append(VersionSpan(version=int(version), start=int(start), end=int(end)))
    return tuple(spans)


def _parts(score: ScoredInfo, place: int) -> str:
    return " ".join(f"{name}={values[place]:.6g}" for name, values in score.parts.items())
