"""Estimates with 95 % bootstrap intervals.

Arrays are [P, N]: P prompts, N samples of each. The prompts are resampled, with all
their samples: those of one prompt are not independent of each other. Intervals are
percentile intervals (Efron & Tibshirani 1993, chapter 13), seeded, so that the same data
give the same interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def mean(values_PN: Floats, *, resamples: int, seed: int) -> Interval:
    """The mean over prompts and samples."""
    return _bootstrap(lambda rows: values_PN[rows].mean(), len(values_PN), resamples, seed)


def difference(before_PN: Floats, after_PN: Floats, *, resamples: int, seed: int) -> Interval:
    """mean(after) - mean(before), paired by prompt: what is hard for both cancels out."""
    _check_paired(before_PN, after_PN)
    change_P = after_PN.mean(1) - before_PN.mean(1)
    return mean(change_P[:, None], resamples=resamples, seed=seed)


def standardised_gain(
    before_PN: Floats, after_PN: Floats, *, resamples: int, seed: int
) -> Interval:
    """(mean(after) - mean(before)) / std(before): a gain in standard deviations of the
    reference policy's scores (Glass's delta). The deviation is over all P x N scores,
    and its own uncertainty is in the interval.

    Raises ValueError where all scores of `before` are equal.
    """
    _check_paired(before_PN, after_PN)
    if np.ptp(before_PN) == 0:
        raise ValueError("the reference policy's scores are all equal: there is no unit of gain")

    def gain(rows: NDArray[np.intp]) -> float:
        before, after = before_PN[rows], after_PN[rows]
        # A resample of few prompts may hold one score only: no spread, nothing to divide by.
        # (The deviation of equal floats is not always 0; their range is.)
        spread = before.std() if np.ptp(before) else np.nan
        return (after.mean() - before.mean()) / spread

    return _bootstrap(gain, len(before_PN), resamples, seed)


def win_rate(before_PN: Floats, after_PN: Floats, *, resamples: int, seed: int) -> Interval:
    """P(a sample of `after` beats one of `before` on the same prompt), ties counting half."""
    _check_paired(before_PN, after_PN)
    after_PN1, before_P1N = after_PN[:, :, None], before_PN[:, None, :]
    wins_PNN = (after_PN1 > before_P1N) + 0.5 * (after_PN1 == before_P1N)
    return mean(wins_PNN.mean((1, 2))[:, None], resamples=resamples, seed=seed)


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Different n-grams of words over all n-grams of words in `texts` (Li et al. 2016).

    1 where nothing repeats; 0 where no text has n words. It falls as texts get longer or
    more, so compare equal numbers of texts, and mind their lengths.
    """
    grams = [
        tuple(words[i : i + n])
        for text in texts
        if (words := text.lower().split())
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def _bootstrap(
    statistic: Callable[[NDArray[np.intp]], float], prompts: int, resamples: int, seed: int
) -> Interval:
    rng = np.random.default_rng(seed)
    draws = [statistic(rng.integers(prompts, size=prompts)) for _ in range(resamples)]
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return Interval(value=float(statistic(np.arange(prompts))), low=float(low), high=float(high))


def _check_paired(before_PN: Floats, after_PN: Floats) -> None:
    if len(before_PN) != len(after_PN):
        raise ValueError(
            f"{len(before_PN)} prompts before and {len(after_PN)} after: not the same prompts"
        )
