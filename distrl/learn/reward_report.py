"""Does a reward model order responses as people do? Accuracy by margin, and calibration."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from numpy.typing import NDArray

from distrl.algo import expected_calibration_error
from distrl.data.errors import DataError
from distrl.records import Float32s

MARGINS = (0.0, 0.5, 1.0, 2.0)
MAX_PAIRS = 20_000
RESAMPLES = 500
CALIBRATION_BINS = 10

ROUNDING = 2.0**-22
"""Of the larger of two ratings: more than their difference is off by, as they are kept, or came,
in 32 bits. On a grid of 0.1, ratings 0.2 apart come out as 0.19999999 or 0.20000005."""

Pairs = NDArray[np.int64]
Gaps = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure, and the ends of its 95 % interval (percentile bootstrap)."""

    value: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement with people on held-out pairs.

    Attributes:
        accuracy: share of pairs ordered as people rated them, for pairs whose mean ratings
            differ by more than each margin ("0.5" → Estimate); margins without a pair are left out.
        calibration_error: expected |σ(r_a − r_b) − share preferred|, over all pairs.
        reliability: (mean probability, share preferred, pairs) for each bin that holds a pair.
        responses: held-out responses behind the pairs.
    """

    accuracy: dict[str, Estimate]
    calibration_error: Estimate
    reliability: tuple[tuple[float, float, int], ...]
    responses: int


def gaps(ratings: Float32s, others: Float32s) -> tuple[Gaps, Gaps]:
    """ratings - others, in 64 bits, and by how much each may be off: what lies within that of a
    bound is at the bound, and what lies within it of 0 is a tie."""
    one, other = ratings.astype(np.float64), others.astype(np.float64)
    return one - other, ROUNDING * np.maximum(np.abs(one), np.abs(other))


def agreement(
    raw_N: Float32s,
    ratings_N: Float32s,
    prompts: Sequence[str],
    seed: int,
    sets: Sequence[Hashable] | None = None,
) -> Agreement:
    """Compare raw scores (before gain and bias) with ratings, on pairs of one set: of those whose
    ratings can be compared. None: of one prompt.

    At most 20,000 pairs, drawn by seed. Pairs share responses and prompts, so the intervals
    resample what is independent: prompts where there are several, else sets, else responses.
    Raises DataError where no pair has unequal ratings.
    """
    sets = prompts if sets is None else sets
    first, second = draw_pairs(ratings_N, sets, seed).T
    units = prompts if len(set(prompts)) > 1 else sets
    lead = raw_N[first] - raw_N[second]
    gap, slack = gaps(ratings_N[first], ratings_N[second])
    prob = 1 / (1 + np.exp(-lead.astype(np.float64)))
    preferred = gap > 0
    right = np.where(preferred, lead > 0, lead < 0)
    weights_RP = resampled_weights(first, second, len(raw_N), units, seed)
    accuracy = {}
    for margin in MARGINS:
        chosen = np.abs(gap) > margin + slack
        if chosen.any():
            accuracy[f"{margin:g}"] = _accuracy(right[chosen], weights_RP[:, chosen])
    return Agreement(
        accuracy=accuracy,
        calibration_error=_calibration_error(prob, preferred, weights_RP),
        reliability=reliability(prob, preferred),
        responses=len(raw_N),
    )


def draw_pairs(ratings_N: Float32s, sets: Sequence[Hashable], seed: int) -> Pairs:
    """[P, 2] places of two responses of one set with unequal ratings, in random order. Raises
    DataError where there are none."""
    by_set: dict[Hashable, list[int]] = {}
    for place, name in enumerate(sets):
        by_set.setdefault(name, []).append(place)
    found = []
    for places in map(np.array, by_set.values()):
        one, other = np.triu_indices(len(places), k=1)
        found.append(np.stack([places[one], places[other]], axis=1))
    pairs = np.concatenate(found) if found else np.empty((0, 2), np.int64)
    gap, slack = gaps(*ratings_N[pairs.T])
    pairs = pairs[np.abs(gap) > slack]
    if not len(pairs):
        raise DataError(
            "no two held-out responses that go together are rated differently "
            f"({len(ratings_N)} responses, of {len(by_set)} prompts or rows), so a reward model "
            "cannot be judged by them: see the ratings in data.source (data.ratings_column), or "
            "give held-out rows in data.validation"
        )
    rng = np.random.default_rng(seed)
    pairs = pairs[rng.permutation(len(pairs))[:MAX_PAIRS]]
    return rng.permuted(pairs, axis=1)


def resampled_weights(
    first: Pairs, second: Pairs, n: int, units: Sequence[Hashable], seed: int
) -> Float32s:
    """weights_RP: how often each pair stands in each bootstrap resample.

    A pair stands as often as the unit that both its responses are of. With one unit alone, it is
    the responses that are resampled, and a pair i, j stands w_i · w_j times.
    """
    rng = np.random.default_rng(seed)
    names = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    if len(names) == 1:
        counts = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float32)
        return counts[:, first] * counts[:, second]
    unit_N = np.array([names[unit] for unit in units])
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    return counts[:, unit_N[first]].astype(np.float32)


def _accuracy(right_P: NDArray[np.bool_], weights_RP: Float32s) -> Estimate:
    sums_R = weights_RP @ right_P.astype(np.float32)
    return _estimate(float(right_P.mean()), sums_R, weights_RP)


def _calibration_error(
    prob_P: NDArray[np.float64], preferred_P: NDArray[np.bool_], weights_RP: Float32s
) -> Estimate:
    """algo's error, and its interval: the same sum over bins with each resample's weights."""
    label_P = preferred_P.astype(np.float64)
    value = expected_calibration_error(
        torch.from_numpy(prob_P), torch.from_numpy(label_P), CALIBRATION_BINS
    )
    in_bin_PK = _bin_of(prob_P)[:, None] == np.arange(CALIBRATION_BINS)
    excess_PK = (in_bin_PK * (prob_P - label_P)[:, None]).astype(np.float32)
    return _estimate(float(value), np.abs(weights_RP @ excess_PK).sum(1), weights_RP)


def _estimate(value: float, sums_R: NDArray[np.floating], weights_RP: Float32s) -> Estimate:
    """`value` with the percentile interval of weighted means; empty resamples are left out."""
    total_R = weights_RP.sum(1)
    means = sums_R[total_R > 0] / total_R[total_R > 0]
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(value=value, low=float(low), high=float(high), pairs=weights_RP.shape[1])


def _bin_of(prob: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.minimum((prob * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)


def reliability(
    prob: NDArray[np.float64], preferred: NDArray[np.bool_]
) -> tuple[tuple[float, float, int], ...]:
    """(mean probability, share preferred, pairs) of each bin that is not empty."""
    inside = [_bin_of(prob) == b for b in range(CALIBRATION_BINS)]
    return tuple(
        (float(prob[i].mean()), float(preferred[i].mean()), int(i.sum())) for i in inside if i.any()
    )


def plot_agreement(quality: Agreement, path: Path) -> None:
    """Two panels: accuracy by how far apart people rated a pair, and the reliability diagram."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    margins, estimates = list(quality.accuracy), list(quality.accuracy.values())
    values = np.array([e.value for e in estimates])
    ends = np.array([[e.value - e.low, e.high - e.value] for e in estimates]).T.clip(min=0)
    left.errorbar(margins, values, yerr=ends, fmt="o", capsize=4)
    left.axhline(0.5, color="grey", linestyle=":", label="chance")
    left.set(xlabel="human ratings differ by more than", ylabel="accuracy")
    left.set_ylim(min(0.4, *(values - ends[0] - 0.05)), 1)
    left.set_title("Held-out pairs ordered as people did")
    left.legend()
    mean, share, pairs = zip(*quality.reliability, strict=True)
    right.plot([0, 1], [0, 1], color="grey", linestyle=":", label="calibrated")
    right.scatter(mean, share, s=10 + 200 * np.array(pairs) / max(pairs))
    right.set(xlabel="predicted probability", ylabel="share preferred by people")
    right.set_title(f"Calibration error {quality.calibration_error.value:.3f}")
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
