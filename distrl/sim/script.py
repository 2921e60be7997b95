"""What happens to a fake role: how long its calls take, and which of them fail."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from distrl.roles import CanaryMismatch, RoleError, ScoreFailed, WorkerDied

Seconds = Callable[[], float]
Fault = Literal["die", "hang", "fail", "mismatch", "no_score"]


def fixed(seconds: float) -> Seconds:
    """Always the same."""
    return lambda: seconds


def log_normal(median: float, sigma: float, seed: int) -> Seconds:
    """Log-normal with this median and this standard deviation of the logarithm."""
    draw = random.Random(seed)
    mu = math.log(median)
    return lambda: draw.lognormvariate(mu, sigma)


@dataclass(kw_only=True, slots=True)
class Faults:
    """The n-th call of a kind (from 1, over the fake's whole life) and what befalls it.

    `work` are generate or score calls, `load` and `restart` those. `rate` is the chance of any
    other work call to fail, `death_rate` of it to kill the worker and `hang_rate` of it to hang,
    drawn from `seed`.
    """

    work: Mapping[int, Fault] = field(default_factory=dict)
    load: Mapping[int, Fault] = field(default_factory=dict)
    restart: Mapping[int, Fault] = field(default_factory=dict)
    rate: float = 0.0
    death_rate: float = 0.0
    hang_rate: float = 0.0
    seed: int = 0
    _calls: dict[str, int] = field(default_factory=dict)
    _random: random.Random | None = None

    def next(self, kind: Literal["work", "load", "restart"]) -> Fault | None:
        """Count one call of `kind` and say what befalls it."""
        self._calls[kind] = call = self._calls.get(kind, 0) + 1
        fault = {"work": self.work, "load": self.load, "restart": self.restart}[kind].get(call)
        if fault is not None or kind != "work":
            return fault
        rates: tuple[tuple[Fault, float], ...] = (
            ("die", self.death_rate),
            ("hang", self.hang_rate),
            ("fail", self.rate),
        )
        if not any(rate for _, rate in rates):
            return None
        self._random = self._random or random.Random(self.seed)
        chance = self._random.random()
        for fault, rate in rates:
            chance -= rate
            if chance < 0:
                return fault
        return None


def error_of(fault: Fault, name: str) -> RoleError:
    """The exception that a fault shows as."""
    if fault == "die":
        return WorkerDied(f"{name}: scripted death")
    if fault == "mismatch":
        return CanaryMismatch(f"{name}: scripted canary mismatch")
    if fault == "no_score":
        return ScoreFailed(f"{name}: scripted score failure")
    return RoleError(f"{name}: scripted failure")
