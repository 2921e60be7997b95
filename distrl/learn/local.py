"""The `Learner` role in one process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distrl.learn.learner import PolicyLearner
from distrl.records import StepReport, Weights


class LocalLearner:
    """A `PolicyLearner` whose calls run on a thread of their own."""

    def __init__(self, learner: PolicyLearner) -> None:
        self.learner = learner

    async def learn(self, payloads: Sequence[Any], *, oldest: int = 0) -> StepReport:
        return await asyncio.to_thread(self.learner.learn, payloads, oldest=oldest)

    async def publish(self) -> Weights:
        return await asyncio.to_thread(self.learner.publish)

    async def save(self, folder: Path) -> None:
        await asyncio.to_thread(self.learner.save, folder)

    async def load(self, folder: Path) -> None:
        await asyncio.to_thread(self.learner.load, folder)

    async def export(self, folder: Path) -> None:
        await asyncio.to_thread(self.learner.export, folder)

    async def close(self) -> None:
        self.learner.close()
