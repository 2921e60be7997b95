"""`metrics.jsonl`: the run's own record, one flat JSON object a learner step.

Invariant: after `rewind_run(dir, k)` the files hold the rows of steps up to k and no
other, so that a run that resumes at step k leaves neither a gap nor a duplicate.
A process that is killed can leave at most one line half written, the last; such a
line is dropped when the file is next opened. A broken line anywhere else raises.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distrl.disk import writing
from distrl.errors import UserError
from distrl.metrics.sinks import Cell, Value

RESUME = "go on with --resume, from the newest checkpoint"
REPAIR = "put a whole copy back, or start the run anew with --fresh"


class MetricsError(UserError):
    """A metrics file is damaged in a way that a crash does not explain."""


class JSONLSink:
    """Writes steps to `path` and tables to `tables/<name>.jsonl` beside it.

    Each line is flushed, so a killed process loses nothing that was logged. A row is
    `{"step": k, "time": seconds since 1970, name: value, …}`; NaN and infinities, which
    JSON has no word for, become null. A table's line is one row of the table.
    Raises NotWritten where the disk is full or refuses; the lines before are there.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._tables = path, path.parent / "tables"
        with writing("metrics", path, RESUME):
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(path)
            self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        row = {"step": step, "time": time.time()}
        if clash := row.keys() & values.keys():
            raise MetricsError(f"{sorted(clash)} are written by the sink; rename the metric")
        line = _line(row | {name: _plain(value) for name, value in values.items()})
        with writing(f"the metrics of step {step}", self._path, RESUME):
            self._file.write(line)
            self._file.flush()

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]
    ) -> None:
        path = self._tables / f"{name}.jsonl"
        with writing(f"the table of step {step}", path, RESUME):
            self._tables.mkdir(exist_ok=True)
            _drop_torn_line(path)
            with path.open("a", encoding="utf-8") as file:
                for row in rows:
                    cells = zip(columns, map(_plain, row), strict=True)
                    file.write(_line({"step": step, **dict(cells)}))

    def close(self) -> None:
        with writing("the last metrics", self._path, RESUME):
            self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that JSONLSink wrote, without a half-written last line.

    Empty where there is no file. Raises MetricsError, with the line, where it is damaged.
    """
    rows = []
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise MetricsError(f"{path}, line {number} is not JSON: {error}; {REPAIR}") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise MetricsError(f"{path}, line {number} has no step; {REPAIR}")
        rows.append(row)
    return rows


def rewind(path: Path, last_step: int) -> int:
    """Drop the rows of steps after `last_step` and a half-written last line, atomically.

    Returns the number of rows kept. A missing file has none. Raises MetricsError where
    the file is damaged; it is then left as it is.
    """
    if not path.exists():
        return 0
    kept = [row for row in read_jsonl(path) if row["step"] <= last_step]
    temporary = path.with_name(f"{path.name}.tmp")
    with writing("metrics", path, RESUME), temporary.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, kept))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return len(kept)


def rewind_run(folder: Path, last_step: int) -> int:
    """Rewind `metrics.jsonl` and every table of a run directory; returns the steps kept."""
    for table in sorted((folder / "tables").glob("*.jsonl")):
        rewind(table, last_step)
    return rewind(folder / "metrics.jsonl", last_step)


def whole_lines(path: Path) -> list[bytes]:
    """The lines that end in a newline: a line without one was cut by a crash."""
    data = path.read_bytes() if path.exists() else b""
    return data.split(b"\n")[:-1]


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """A JSON value: numpy's numbers become Python's, and what is not finite None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _plain(value.tolist())
    number = float(value)
    return number if math.isfinite(number) else None
