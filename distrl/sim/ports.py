"""A prompt source without text, checkpoints of which only the state is kept, rows in a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distrl.records import Prompt

_TOKENS = np.zeros(4, np.int32)


class CountingSource:
    """Prompts "p0", "p1", … without end."""

    def __init__(self) -> None:
        self.cursor = 0

    def next(self) -> Prompt:
        index = self.cursor
        self.cursor += 1
        return Prompt(index=index, epoch=0, prompt_id=f"p{index}", text="", token_ids=_TOKENS)

    def seek(self, cursor: int) -> None:
        self.cursor = cursor


class MemoryCheckpoints:
    """Folders below `folder`; `states` has what was committed, by step, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states: dict[int, dict[str, Any]] = {}

    def begin(self, step: int) -> Path:
        path = self.folder / f"step_{step:06d}"
        path.mkdir(parents=True)
        return path

    def commit(self, step: int, state: Mapping[str, Any]) -> Path:
        self.states[step] = dict(state)
        return self.folder / f"step_{step:06d}"


class Rows:
    """A metrics sink: the row of every step, in order."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self.rows.append((step, dict(values)))

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """Tables are for people; nobody reads a simulation's."""

    def close(self) -> None: ...
