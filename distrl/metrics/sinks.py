"""Where metrics go: the protocol, several sinks as one, and one for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol, runtime_checkable

Value = float | Sequence[float]
Cell = str | float | int | None


@runtime_checkable
class Sink(Protocol):
    """Takes a step's values. `log` and `table` are quick and may be called from one
    thread only; `close` may be called twice."""

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Record the values of learner step `step` (from 1): numbers, and histograms as
        lists of counts."""
        ...

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]
    ) -> None:
        """Record a table of `rows`, each as long as `columns`."""
        ...

    def close(self) -> None:
        """Write out what is left."""
        ...


class ListSink:
    """Keeps everything, for tests: `rows`, `tables` and `closed`."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Value]]] = []
        self.tables: list[tuple[int, str, list[str], list[list[Cell]]]] = []
        self.closed = False

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        self.rows.append((step, dict(values)))

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]
    ) -> None:
        self.tables.append((step, name, list(columns), [list(row) for row in rows]))

    def close(self) -> None:
        self.closed = True


class MultiSink:
    """Hands everything to each of `sinks`, in order.

    Put the JSONL sink first: it is the truth, and is then written before any other.
    """

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        for sink in self.sinks:
            sink.log(step, values)

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]
    ) -> None:
        for sink in self.sinks:
            sink.table(step, name, columns, rows)

    def close(self) -> None:
        """Close each, in order, also where one before it fails."""
        with ExitStack() as closing:
            for sink in reversed(self.sinks):
                closing.callback(sink.close)
