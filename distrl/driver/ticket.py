"""A group under way, and the account of what was done for nothing."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from distrl.records import GroupInfo, Prompt


@dataclass(slots=True)
class Waste:
    """What was done for nothing, by reason: response tokens, and seconds of generation."""

    tokens: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, reason: str, tokens: int, seconds: float) -> None:
        self.tokens[reason] += tokens
        self.seconds[reason] += seconds


@dataclass(slots=True)
class Ticket:
    """A group under way.

    Attributes:
        holder: who has it now.
        version: no token of it is of an older one; None while no generator has it.
        bound: staleness bound that it was admitted under.
        began_s: when its present attempt was given to a generator.
        group: what was generated, once it was.
        doomed: it is too old for any gradient, and was given up.
    """

    prompt: Prompt
    admitted_s: float
    bound: int
    version: int | None = None
    began_s: float = 0.0
    holder: str = "the driver"
    group: GroupInfo | None = None
    doomed: bool = False
    task: asyncio.Task[None] | None = None
