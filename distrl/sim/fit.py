"""The durations of a real run, measured from what it left: ledger and metrics.

The engines' pace is what makes a replay of the run's groups take as long as they took (`pace.py`).
The learner's c + d·tokens follows from the steps' times by least squares, and so does the scorer's.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrl.config import Config, SimulateConfig
from distrl.driver.errors import DriverError
from distrl.driver.ledger_file import open_to_read
from distrl.sim.pace import Group, Stop, pace_of

WARM_UP = 2
"""Steps left out at the start: what is compiled or cached then is not typical."""

ALIKE = 0.01
"""Groups that differ in tokens by a smaller share than this do not say what a token takes."""

Floats = NDArray[np.float64]


class NoTimings(DriverError):
    """The run has nothing to measure durations from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What a run says of durations; `doubt`: of what it does not say, or nothing."""

    model: SimulateConfig
    doubt: str = ""


def fitted(ledger: Path, metrics: Path, config: Config) -> Fit:
    """`config.simulate` with the durations and lengths of a real run that had this `config`.

    Raises LedgerError where the ledger cannot be read, NoTimings where it has no timed group or
    the metrics have fewer than three steps.
    """
    rows = _steps(metrics)
    with open_to_read(ledger) as db:
        groups, lengths, learned = _groups(db), _lengths(db), _learned(db)
    if not groups:
        raise NoTimings(
            f"{ledger} has no group with times; simulate from a run that took some steps"
        )
    steady = rows[WARM_UP:]
    iteration_s, sequence_s, told = pace_of(
        _engines_groups(groups, learned), _stops(rows, learned), config.generate.max_num_seqs
    )
    score_s, score_token_s = _scoring(groups)
    learn_s, learn_token_s, jitter = _learning(steady)
    publish_s = median(row["time/publish"] for row in steady)
    others = [
        row["time/step"] - row["time/idle_learner"] - row["time/learn"] - row["time/publish"]
        for row in steady
    ]
    durations = {
        "lengths": tuple(lengths),
        "iteration_s": iteration_s,
        "sequence_s": sequence_s,
        "score_s": score_s,
        "score_token_s": score_token_s,
        "learn_s": learn_s,
        "learn_token_s": learn_token_s,
        "jitter": jitter,
        "publish_s": publish_s,
        "load_s": max(0.0, median(row["time/sync"] for row in steady) - publish_s),
        "other_s": max(0.0, fmean(others)),
    }
    return Fit(
        model=config.simulate.model_copy(update=durations),
        doubt="" if told else _no_split(config, iteration_s, sequence_s),
    )


def _no_split(config: Config, iteration_s: float, sequence_s: float) -> str:
    bound = config.driver.largest_bound
    other = "fewer driver.prompts_per_step" if bound else "driver.max_staleness=1"
    return (
        "its groups ran in like company, which does not tell what an iteration of the engine takes "
        f"by itself from what each sequence adds: simulate.iteration_s={iteration_s:.3g} and "
        f"sequence_s={sequence_s:.3g} are the middle of what may be, and rates with more or fewer "
        "sequences at once may be off. To tell them apart, simulate from a short run with "
        f"{other}"
    )


def _steps(metrics: Path) -> list[dict[str, Any]]:
    if not metrics.exists():
        raise NoTimings(f"there is no {metrics}; is this a run directory?")
    whole = metrics.read_text().rpartition("\n")[0]  # of a run that was killed
    rows = [json.loads(line) for line in whole.splitlines()]
    steady = rows[WARM_UP:]
    if not steady or "time/learn" not in steady[0]:
        raise NoTimings(f"{metrics} has no times of steps after the first {WARM_UP}")
    if "time/publish" not in steady[0]:
        raise NoTimings(f"{metrics} is of an older distrl, without time/publish; run it again")
    return rows


def _groups(db: sqlite3.Connection) -> list[dict[str, Any]]:
    names = ("index", "attempt", "generator", "end", "seconds", "score_s")
    samples: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, attempt, tokens in db.execute(
        "SELECT idx, attempt, tokens FROM samples ORDER BY idx, attempt, sample"
    ):
        samples[index, attempt].append(tokens)
    rows = db.execute(
        "SELECT idx, attempt, generator, generated_s, generate_s, score_s FROM attempts "
        "WHERE generate_s IS NOT NULL AND score_s IS NOT NULL"
    )
    groups: list[dict[str, Any]] = [dict(zip(names, row, strict=True)) for row in rows]
    for group in groups:
        group["lengths"] = samples[group["index"], group["attempt"]]
    return [group for group in groups if group["lengths"]]


def _lengths(db: sqlite3.Connection) -> list[int]:
    """In order of issue; what a resume rolled back is there once more, as the next attempt."""
    rows = db.execute(
        "SELECT s.tokens FROM samples s JOIN attempts a ON a.idx = s.idx AND "
        "a.attempt = s.attempt WHERE a.undone IS NULL ORDER BY s.idx, s.sample"
    )
    return [row[0] for row in rows]


def _learned(db: sqlite3.Connection) -> dict[int, float]:
    """When each step had been learned."""
    return dict(db.execute("SELECT step, learned_s FROM steps WHERE undone IS NULL").fetchall())


def _engines_groups(groups: Sequence[dict[str, Any]], learned: dict[int, float]) -> list[Group]:
    """Groups as their engines met them; those of the warm-up do not count."""
    warm_s = learned.get(WARM_UP, float("-inf"))
    return [
        Group(
            generator=group["generator"],
            index=group["index"],
            began_s=group["end"] - group["seconds"],
            seconds=group["seconds"],
            lengths=tuple(group["lengths"]),
            counts=group["end"] - group["seconds"] >= warm_s,
        )
        for group in groups
    ]


def _stops(rows: Sequence[dict[str, Any]], learned: dict[int, float]) -> list[Stop]:
    """When the engines took weights on: after each step, once these were published."""
    return [
        Stop(
            at_s=learned[row["step"]] + row["time/publish"],
            seconds=row["time/sync"] - row["time/publish"],
        )
        for row in rows
        if row["step"] in learned and row.get("time/sync", 0.0) > row.get("time/publish", 0.0)
    ]


def _scoring(groups: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """(base, seconds a token) of a scorer: the quickest tenth waited for nobody else's pass."""
    quick = sorted(groups, key=lambda group: group["score_s"])[: max(2, len(groups) // 10)]
    tokens = np.array([sum(group["lengths"]) for group in quick], dtype=float)
    seconds = np.array([group["score_s"] for group in quick])
    if tokens.std() < ALIKE * tokens.mean():  # a pass takes all that waits: most is shared
        return float(seconds.mean()), 0.0
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
