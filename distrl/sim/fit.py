"""The durations of a real run, measured from what it left: ledger and metrics.

An iteration of an engine with n sequences takes a + b·n seconds (`engine.py`). A group whose
longest sample has L tokens, decoded while n̄ sequences ran on average, took

    seconds ≈ a·L + b·n̄·L

n̄ comes from the times of all groups of the same generator, so a and b follow by least squares.
The learner's c + d·tokens follows from the steps' times likewise, and so does the scorer's.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrl.config import SimulateConfig
from distrl.driver.errors import DriverError
from distrl.driver.ledger_file import open_to_read

WARM_UP = 2
"""Steps left out at the start: what is compiled or cached then is not typical."""

Floats = NDArray[np.float64]


class NoTimings(DriverError):
    """The run has nothing to measure durations from."""


def fitted(ledger: Path, metrics: Path, model: SimulateConfig) -> SimulateConfig:
    """`model` with the durations and lengths of a real run.

    Raises LedgerError where the ledger cannot be read, NoTimings where it has no timed group or
    the metrics have fewer than three steps.
    """
    rows = _steps(metrics)
    with open_to_read(ledger) as db:
        groups, lengths = _groups(db), _lengths(db)
    if not groups:
        raise NoTimings(
            f"{ledger} has no group with times; simulate from a run that took some steps"
        )
    iteration_s, sequence_s = _pace(groups)
    score_s, score_token_s = _scoring(groups)
    learn_s, learn_token_s, jitter = _learning(rows)
    publish_s = median(row["time/publish"] for row in rows)
    others = [
        row["time/step"] - row["time/idle_learner"] - row["time/learn"] - row["time/publish"]
        for row in rows
    ]
    return model.model_copy(
        update={
            "lengths": tuple(lengths),
            "iteration_s": iteration_s,
            "sequence_s": sequence_s,
            "score_s": score_s,
            "score_token_s": score_token_s,
            "learn_s": learn_s,
            "learn_token_s": learn_token_s,
            "jitter": jitter,
            "publish_s": publish_s,
            "load_s": max(0.0, median(row["time/sync"] for row in rows) - publish_s),
            "other_s": max(0.0, fmean(others)),
        }
    )


def _steps(metrics: Path) -> list[dict[str, Any]]:
    if not metrics.exists():
        raise NoTimings(f"there is no {metrics}; is this a run directory?")
    whole = metrics.read_text().rpartition("\n")[0]  # of a run that was killed
    rows = [json.loads(line) for line in whole.splitlines()][WARM_UP:]
    if not rows or "time/learn" not in rows[0]:
        raise NoTimings(f"{metrics} has no times of steps after the first {WARM_UP}")
    if "time/publish" not in rows[0]:
        raise NoTimings(f"{metrics} is of an older distrl, without time/publish; run it again")
    return rows


def _groups(db: sqlite3.Connection) -> list[dict[str, Any]]:
    names = ("generator", "end", "seconds", "scored", "score_s", "longest", "tokens", "samples")
    rows = db.execute(
        "SELECT a.generator, a.generated_s, a.generate_s, a.scored_s, a.score_s, max(s.tokens), "
        "sum(s.tokens), count(*) FROM attempts a JOIN samples s ON s.idx = a.idx AND "
        "s.attempt = a.attempt WHERE a.generate_s IS NOT NULL AND a.score_s IS NOT NULL "
        "GROUP BY a.idx, a.attempt"
    )
    return [dict(zip(names, row, strict=True)) for row in rows]


def _lengths(db: sqlite3.Connection) -> list[int]:
    """In order of issue; what a resume rolled back is there once more, as the next attempt."""
    rows = db.execute(
        "SELECT s.tokens FROM samples s JOIN attempts a ON a.idx = s.idx AND "
        "a.attempt = s.attempt WHERE a.undone IS NULL ORDER BY s.idx, s.sample"
    )
    return [row[0] for row in rows]


def _pace(groups: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """(a, b) of the engine."""
    by_generator: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for group in groups:
        by_generator[group["generator"]].append(group)
    longest, load, seconds = [], [], []
    for mine in by_generator.values():
        running = _mean_running(mine)
        longest += [group["longest"] for group in mine]
        load += [n * group["longest"] for n, group in zip(running, mine, strict=True)]
        seconds += [group["seconds"] for group in mine]
    a, b = _non_negative(np.array(longest), np.array(load), np.array(seconds))
    return max(a, 1e-6), b


def _mean_running(groups: Sequence[dict[str, Any]]) -> Floats:
    """Mean number of sequences that ran beside and with each group, over its own time.

    A group counts with its samples until their mean length is reached: tokens / longest of them.
    """
    start = np.array([group["end"] - group["seconds"] for group in groups])
    end = np.array([group["end"] for group in groups])
    alive = np.array([group["tokens"] / group["longest"] for group in groups])
    order = np.argsort(np.concatenate([start, end]), kind="stable")
    times = np.concatenate([start, end])[order]
    running = np.cumsum(np.concatenate([alive, -alive])[order])
    area = np.concatenate([[0.0], np.cumsum(running[:-1] * np.diff(times))])
    at = np.interp(end, times, area) - np.interp(start, times, area)
    return at / np.maximum(end - start, 1e-9)


def _scoring(groups: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """(base, seconds a token) of a scorer: the quickest tenth waited for nobody else's pass."""
    quick = sorted(groups, key=lambda group: group["score_s"])[: max(2, len(groups) // 10)]
    tokens = np.array([group["tokens"] for group in quick], dtype=float)
    seconds = np.array([group["score_s"] for group in quick])
    return _non_negative(np.ones_like(tokens), tokens, seconds)


def _learning(rows: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """(base, seconds a token, deviation of the logarithm) of the learner."""
    totals = [row["tokens/total"] for row in rows]
    tokens = np.diff(totals) if len(rows) > 3 else np.array([])
    seconds = np.array([row["time/learn"] for row in rows[1:]])
    if not len(tokens):
        return fmean(row["time/learn"] for row in rows), 0.0, 0.0
    base, each = _non_negative(np.ones(len(tokens)), tokens.astype(float), seconds)
    off = np.log(seconds / (base + each * tokens))
    return base, each, float(off.std())


def _non_negative(x: Floats, y: Floats, target: Floats) -> tuple[float, float]:
    """(p, q) >= 0 with the least squares of p·x + q·y - target."""
    from scipy.optimize import nnls

    (p, q), _ = nnls(np.stack([x, y], axis=1).astype(float), target.astype(float))
    return float(p), float(q)
