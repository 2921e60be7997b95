"""Rewards by rule that the benchmarks train on."""

from __future__ import annotations

from typing import Any

from distrl.evaluate.judge import vader_compound


def liked(*, response: str, **_: Any) -> float:
    """1 where VADER finds the continuation clearly positive (compound 0.5 or more), else 0."""
    return float(vader_compound(response) >= 0.5)
