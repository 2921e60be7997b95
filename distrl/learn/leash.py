"""Who sets the price of leaving the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distrl.algo import AdaptiveKL, FixedKL, LinearKL
from distrl.config import LearnConfig

Leash = AdaptiveKL | FixedKL | LinearKL


def leash(config: LearnConfig, samples: int) -> Leash:
    """The price of a nat of KL to the reference, over a run of so many samples."""
    kl = config.kl
    if kl.kind == "adaptive":
        return AdaptiveKL(kl.coef, kl.target, kl.horizon)
    if kl.kind == "linear":
        return LinearKL(kl.coef, kl.final, samples)
    return FixedKL(kl.coef)


def plan_leash(kl: Leash, samples: int) -> None:
    """Have a price that goes by plan arrive after so many samples."""
    if isinstance(kl, LinearKL):
        kl.samples = samples


def resume_leash(kl: Leash, saved: Mapping[str, Any]) -> None:
    """Take up where a leash was saved (its fields); what is set stays as it is set now."""
    if isinstance(kl, AdaptiveKL):
        kl.coef = saved["coef"]
    if isinstance(kl, LinearKL):
        kl.seen = saved["seen"]
