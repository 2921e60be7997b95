"""A prompt source without text, and checkpoints of which only the state is kept in memory."""

from __future__ import annotations

from collections.abc import Mapping
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
