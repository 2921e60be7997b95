"""Two policies on the same prompts, before and after training."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace

import numpy as np

from distrl.evaluate import stats
from distrl.evaluate.policy import PolicyEvaluation
from distrl.evaluate.stats import Interval
from distrl.roles import ScoreFailed


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One quantity of both policies, and its change paired by prompt."""

    before: Interval
    after: Interval
    change: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What training did; every interval is a 95 % one.

    Attributes:
        measures: "reward", "kl" (nats a response), "length" (tokens), "judge" if there is one.
        gain: change of reward in standard deviations of the scores before; None where
            those are all equal.
        wins: share of prompts on which a sample after beats one before, ties half, by
            "reward" and by "judge".
        distinct: (before, after) distinct n-grams of words over all, by "distinct-1" and -2.
        truncated: (before, after) share of responses cut by length.
        left_out: prompts that are in no figure, as a reward failed on a sample of either policy.
        left_out_reason: why the first of them is; None where there is none.
    """

    before: PolicyEvaluation
    after: PolicyEvaluation
    measures: dict[str, Measure]
    gain: Interval | None
    wins: dict[str, Interval]
    distinct: dict[str, tuple[float, float]]
    truncated: tuple[float, float]
    left_out: int = 0
    left_out_reason: str | None = None


def compare(
    before: PolicyEvaluation, after: PolicyEvaluation, *, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Compare two evaluations on the same prompts; ValueError where the prompts differ.

    `before` is the reference policy: its scores give the unit of the gain. A prompt that a reward
    failed on for one of them is left out of both; ScoreFailed where none is left.
    """
    failed = before.failed | after.failed
    before, after = _without(before, failed), _without(after, failed)
    reason = next(iter(failed.values()), None)
    if reason is not None and not (before.rows and after.rows):
        raise ScoreFailed(f"no prompt has a reward with both policies; the first: {reason}")
    if before.prompt_ids != after.prompt_ids:
        raise ValueError(f"{before.name} and {after.name} were evaluated on different prompts")
    judged = ["judge"] if before.has_judge and after.has_judge else []
    rewards_PN = before.column("reward"), after.column("reward")
    varied = np.ptp(rewards_PN[0]) > 0
    return Comparison(
        before=before,
        after=after,
        measures={
            name: _measure(before, after, name, resamples, seed)
            for name in ["reward", "kl", "length", *judged]
        },
        gain=stats.standardised_gain(*rewards_PN, resamples=resamples, seed=seed)
        if varied
        else None,
        wins={
            name: stats.win_rate(
                before.column(name), after.column(name), resamples=resamples, seed=seed
            )
            for name in ["reward", *judged]
        },
        distinct={f"distinct-{n}": (_distinct(before, n), _distinct(after, n)) for n in (1, 2)},
        truncated=(_truncated(before), _truncated(after)),
        left_out=len(failed),
        left_out_reason=reason,
    )


def _without(evaluation: PolicyEvaluation, failed: Container[str]) -> PolicyEvaluation:
    rows = tuple(row for row in evaluation.rows if row.prompt_id not in failed)
    return replace(evaluation, rows=rows)


def _measure(
    before: PolicyEvaluation, after: PolicyEvaluation, name: str, resamples: int, seed: int
) -> Measure:
    pair = before.column(name), after.column(name)
    one, two = (stats.mean(values, resamples=resamples, seed=seed) for values in pair)
    change = stats.difference(*pair, resamples=resamples, seed=seed)
    return Measure(before=one, after=two, change=change)


def _distinct(evaluation: PolicyEvaluation, n: int) -> float:
    return stats.distinct_n((row.response for row in evaluation.rows), n)


def _truncated(evaluation: PolicyEvaluation) -> float:
    cut = sum(row.finish_reason == "length" for row in evaluation.rows)
    return cut / len(evaluation.rows)
