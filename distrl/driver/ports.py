"""What the driver needs besides roles: prompts, and a place for checkpoints."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from distrl.records import Prompt

RolloutsHook = Callable[[int, Sequence[Any]], Awaitable[None]]
"""Called with a learner step and the payloads it trained on, in the order of issue."""


class PromptSource(Protocol):
    """An endless stream of prompts with a place in it."""

    def next(self) -> Prompt:
        """The prompt at the cursor; its `index` is the cursor, which then moves on by one."""
        ...

    def seek(self, cursor: int) -> None:
        """Go to a place, such that the next prompt has `index == cursor`."""
        ...


class CheckpointStore(Protocol):
    """Folders of which a reader sees all or nothing. Calls may block: they run in a thread."""

    def begin(self, step: int) -> Path:
        """A fresh folder to write into, not yet visible as a checkpoint."""
        ...

    def commit(self, step: int, state: Mapping[str, Any]) -> Path:
        """Make the folder that `begin` gave, and `state` with it, the newest checkpoint."""
        ...
