"""The audit: does a run's ledger prove what the driver promises?

Each check is a function from what is on disk to a `Finding`. It trusts nothing that the driver
said of itself at run time: counts, ages and orders are computed anew from the rows.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distrl.driver.ledger import spans_of
from distrl.driver.ledger_file import LedgerError, open_to_read, read_meta
from distrl.driver.reason import kind_of
from distrl.metrics.jsonl import whole_lines

WITHOUT_ROW = 2
"""So many steps at most are in the ledger before they have their rows: the newest, and the one
before it, whose weights the generators load while the newest is learned."""

SAME_LENGTHS_P = 0.001
"""Smaller chances than this of seeing such lengths, were those trained drawn from those issued,
count as a bias."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        promise: what was checked, as a sentence that is true where `holds`.
        seen: how much was looked at, in words.
        offenders: every breach, one line each.
    """

    promise: str
    seen: str
    offenders: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.offenders


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """All findings on a run, and what else the ledger tells.

    Attributes:
        drops: dropped prompts by reason.
        retries: attempts that failed and were tried again, by reason.
        waste: kind of reason → (attempts, response tokens, generator seconds) that went into no
            gradient.
        examples: kind → the whole reason of one attempt, where that says more.
    """

    findings: tuple[Finding, ...]
    counts: dict[str, int]
    drops: dict[str, int]
    retries: dict[str, int]
    waste: dict[str, tuple[int, int, float]]
    examples: dict[str, str]

    @property
    def holds(self) -> bool:
        return all(finding.holds for finding in self.findings)


def audit(ledger: Path, metrics: Path, run_id: str | None = None, committed: int = 0) -> Audit:
    """Audit a run by its `ledger.sqlite` and `metrics.jsonl`.

    `run_id` is what a checkpoint of the run says of its ledger, where there is one, and `committed`
    the step of the newest. The run may be alive: all is read of one moment. Raises LedgerError
    where the ledger is missing, damaged, of a newer schema or of another run.
    """
    with open_to_read(ledger) as db:
        db.execute("BEGIN")  # from its first read to the end, what others write is not seen
        mine = read_meta(db).get("run_id")
        if run_id is not None and mine != run_id:
            raise LedgerError(
                f"{ledger} is of another run ({mine}) than the checkpoints beside it ({run_id})"
            )
        try:
            return _audit(db, metrics, committed)
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{ledger} is damaged ({error}); restore it from a copy") from None


def _audit(db: sqlite3.Connection, metrics: Path, committed: int) -> Audit:
    rows = metrics_complete(db, metrics, committed)  # first: a run that is alive writes more
    findings = (
        exactly_once(db),
        one_gradient(db),
        young_enough(db),
        versions_ascend(db),
        rows,
        no_bias_by_length(db),
    )
    thrown, examples = waste(db)
    return Audit(
        findings=findings,
        counts=counts(db),
        drops=_reasons(db, "dropped"),
        retries=_reasons(db, "failed"),
        waste=thrown,
        examples=examples,
    )


def exactly_once(db: sqlite3.Connection) -> Finding:
    """Every prompt below the frontier was trained on once or dropped; none is missing."""
    fates: dict[int, list[str]] = defaultdict(list)
    issued = {row[0] for row in db.execute("SELECT DISTINCT idx FROM attempts")}
    for index, step in db.execute("SELECT idx, step FROM trainings WHERE undone IS NULL"):
        fates[index].append(f"trained in step {step}")
    dropped = "SELECT idx, reason FROM attempts WHERE ended = 'dropped' AND undone IS NULL"
    for index, reason in db.execute(dropped):
        fates[index].append(f"dropped ({reason})")
    frontier = _newest(db, "cursor")  # below it every prompt must be settled
    wrong = []
    for index in range(max(frontier, max(issued, default=-1) + 1)):
        settled = fates.get(index, [])
        if index not in issued:
            wrong.append(f"prompt {index} was never issued, though later ones were")
        elif len(settled) > 1:
            wrong.append(f"prompt {index}: {' and '.join(settled)}")
        elif not settled and index < frontier:
            wrong.append(f"prompt {index} was neither trained nor dropped")
    pending = len(issued - fates.keys())
    return Finding(
        promise="every issued prompt was trained exactly once, or dropped with a reason",
        seen=f"{len(issued):,} prompts" + (f", {pending} of them still open" if pending else ""),
        offenders=tuple(wrong),
    )


def one_gradient(db: sqlite3.Connection) -> Finding:
    """No attempt, hence no sample, went into two gradient steps."""
    rows = db.execute(
        "SELECT idx, attempt, group_concat(step) FROM trainings WHERE undone IS NULL "
        "GROUP BY idx, attempt HAVING count(*) > 1 ORDER BY idx"
    )
    unknown = db.execute(
        "SELECT t.step, t.idx, t.attempt FROM trainings t LEFT JOIN attempts a "
        "ON a.idx = t.idx AND a.attempt = t.attempt WHERE a.admitted_s IS NULL"
    )
    wrong = [f"prompt {i}, attempt {a}: in steps {steps}" for i, a, steps in rows]
    wrong += [f"step {s} trained on prompt {i}, attempt {a}, never admitted" for s, i, a in unknown]
    total = db.execute("SELECT count(*) FROM trainings WHERE undone IS NULL").fetchone()[0]
    return Finding(
        promise="no sample is in two gradient steps",
        seen=f"{total:,} groups trained",
        offenders=tuple(wrong),
    )


def young_enough(db: sqlite3.Connection) -> Finding:
    """No token was older than the bound at its gradient, but for those masked out of it."""
    rows = db.execute(
        "SELECT t.step, t.idx, s.spans, t.masked, x.version, x.bound FROM trainings t "
        "JOIN steps x ON x.step = t.step AND x.undone IS NULL "
        "JOIN samples s ON s.idx = t.idx AND s.attempt = t.attempt "
        "WHERE t.undone IS NULL ORDER BY t.step, t.idx"
    )
    tokens, oldest = 0, 0
    over: dict[tuple[int, int], list[int]] = {}
    allowed: dict[tuple[int, int], int] = {}
    for step, index, spans, masked, version, bound in rows:
        allowed[step, index] = masked
        for span in spans_of(spans):
            age, length = version - span.version, span.end - span.start
            tokens += length
            if 0 <= age <= bound:
                oldest = max(oldest, age)
            else:
                over.setdefault((step, index), []).extend([age] * length)
    wrong = [
        f"step {step}, prompt {index}: {len(ages)} tokens out of bounds (ages {min(ages)} to "
        f"{max(ages)}), {allowed[step, index]} masked"
        for (step, index), ages in over.items()
        if len(ages) != allowed[step, index] or min(ages) < 0
    ]
    without = db.execute(
        "SELECT t.step, t.idx FROM trainings t LEFT JOIN samples s ON s.idx = t.idx AND "
        "s.attempt = t.attempt WHERE t.undone IS NULL AND s.idx IS NULL"
    )
    wrong += [f"step {step}, prompt {index}: no version spans" for step, index in without]
    return Finding(
        promise="no token was older than the staleness bound at its gradient",
        seen=f"{tokens:,} tokens; oldest trained on: {oldest} versions",
        offenders=tuple(wrong),
    )


def versions_ascend(db: sqlite3.Connection) -> Finding:
    """Each generator loads newer versions only, and its samples' spans ascend."""
    wrong: list[str] = []
    held: dict[tuple[int, str], int] = {}
    loads = 0
    events = db.execute("SELECT fence, who, what, detail FROM events ORDER BY rowid")
    for fence, who, what, detail in events:
        if what == "lost":
            held.pop((fence, who), None)
        elif what == "loaded":
            loads += 1
            before = held.get((fence, who), -1)
            if int(detail) < before:
                wrong.append(f"{who} went from version {before} back to {detail}")
            held[fence, who] = int(detail)
    for index, attempt, sample, spans in db.execute(
        "SELECT idx, attempt, sample, spans FROM samples"
    ):
        versions = [span.version for span in spans_of(spans)]
        if any(b <= a for a, b in pairwise(versions)):
            wrong.append(f"prompt {index}, attempt {attempt}, sample {sample}: versions {spans}")
    return Finding(
        promise="versions ascend on each generator, and within each sample",
        seen=f"{loads:,} loads",
        offenders=tuple(wrong),
    )


def metrics_complete(db: sqlite3.Connection, metrics: Path, committed: int) -> Finding:
    """`metrics.jsonl` has each learner step of the ledger once, in order, and no other.

    Up to the newest checkpoint this holds at any moment: it is committed when the rows before it
    are there and the ledger is written. Beyond it, the end of a run that is alive, or did not end
    well, may be on one side alone, and is told as open: steps that have no row yet (`WITHOUT_ROW`),
    or rows since the ledger was written last, as many as there are steps in a second. A driver
    that has ended wrote all that it knew, so then no row is without its step.
    """
    taken = [r[0] for r in db.execute("SELECT step FROM steps WHERE undone IS NULL ORDER BY step")]
    logged, wrong = _steps_logged(metrics, needed=bool(taken))
    last, committed = max(taken, default=0), max(committed, _newest(db, "step"))
    rowless = {s for s in taken if s > max(logged, default=0) and s > last - WITHOUT_ROW}
    unwritten = set() if _ended(db) else {s for s in logged if s > last}
    rowless, unwritten = ({s for s in some if s > committed} for some in (rowless, unwritten))
    known = {*taken, *unwritten}
    wrong += [f"step {step} is in metrics.jsonl {n} times" for step, n in _doubled(logged)]
    wrong += [f"step {step} is in the ledger {n} times" for step, n in _doubled(taken)]
    wrong += [f"step {b} follows step {a} in metrics.jsonl" for a, b in pairwise(logged) if b < a]
    wrong += [f"step {s} is not in metrics.jsonl" for s in sorted({*taken} - {*logged} - rowless)]
    wrong += [f"step {step} is not in the ledger" for step in sorted({*logged} - known)]
    until = max(known, default=0) + 1
    wrong += [f"step {step} was never taken" for step in sorted({*range(1, until)} - known)]
    told = [f"step {step} is still open: it has no row yet" for step in sorted(rowless)]
    told += [
        f"step {step} is still open: the ledger was not written since" for step in sorted(unwritten)
    ]
    return Finding(
        promise="metrics.jsonl has every learner step once, without a gap",
        seen="; ".join([f"{len(logged):,} rows", *told]),
        offenders=tuple(wrong),
    )


def _newest(db: sqlite3.Connection, column: Literal["step", "cursor"]) -> int:
    """Of the newest checkpoint that the ledger knows of; 0 where there is none."""
    query = f"SELECT max({column}) FROM checkpoints WHERE undone IS NULL"
    return db.execute(query).fetchone()[0] or 0


def _ended(db: sqlite3.Connection) -> bool:
    """Whether the newest driver has said that it ended; one that was killed has not."""
    newest = db.execute("SELECT ended FROM runs ORDER BY fence DESC LIMIT 1").fetchone()
    return newest is not None and newest[0] is not None


def _steps_logged(metrics: Path, *, needed: bool) -> tuple[list[int], list[str]]:
    """The steps of the rows, and what is wrong with the file. It is made after the actors, and
    before any step is taken (`needed`)."""
    if not metrics.exists():
        return [], [f"there is no {metrics.name}"] * needed
    steps, wrong = [], []
    for number, line in enumerate(whole_lines(metrics), start=1):
        try:
            steps.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            wrong.append(f"line {number} of {metrics.name} is not a metrics row")
    return steps, wrong


def _doubled(steps: Sequence[int]) -> list[tuple[int, int]]:
    return [(step, n) for step, n in Counter(steps).items() if n > 1]


def no_bias_by_length(db: sqlite3.Connection) -> Finding:
    """Lengths trained on are distributed as lengths generated (Kolmogorov-Smirnov).

    Generated for prompts up to the last one trained on, and settled: beyond it, and of those still
    under way, the short responses are the first to be there.
    """
    generated = _lengths(
        db,
        "SELECT s.tokens FROM samples s JOIN attempts a ON a.idx = s.idx AND "
        "a.attempt = s.attempt WHERE a.undone IS NULL AND a.ended IS NOT NULL AND "
        "a.idx <= (SELECT max(idx) FROM trainings WHERE undone IS NULL)",
    )
    trained = _lengths(
        db,
        "SELECT s.tokens FROM trainings t JOIN samples s ON s.idx = t.idx AND "
        "s.attempt = t.attempt WHERE t.undone IS NULL",
    )
    wrong, seen = [], f"{len(trained):,} of {len(generated):,} samples"
    if len(trained) and len(generated):
        from scipy.stats import ks_2samp

        test: Any = ks_2samp(trained, generated)
        distance, p = float(test.statistic), float(test.pvalue)
        seen += f"; distance {distance:.3f}, p {p:.2g}"
        if p < SAME_LENGTHS_P:
            wrong.append(
                f"trained samples have {trained.mean():.1f} tokens on average, generated ones "
                f"{generated.mean():.1f} (distance {distance:.3f}, p {p:.2g})"
            )
    return Finding(
        promise="trained lengths are distributed as generated lengths (Kolmogorov-Smirnov)",
        seen=seen,
        offenders=tuple(wrong),
    )


def _lengths(db: sqlite3.Connection, query: str) -> np.ndarray:
    return np.fromiter((row[0] for row in db.execute(query)), dtype=np.int64)


def counts(db: sqlite3.Connection) -> dict[str, int]:
    """How far prompts and attempts got."""

    def count(query: str) -> int:
        return db.execute(query).fetchone()[0]

    return {
        "prompts issued": count("SELECT count(DISTINCT idx) FROM attempts"),
        "attempts": count("SELECT count(*) FROM attempts"),
        "generated": count("SELECT count(*) FROM attempts WHERE generated_s IS NOT NULL"),
        "scored": count("SELECT count(*) FROM attempts WHERE scored_s IS NOT NULL"),
        "admitted": count("SELECT count(*) FROM attempts WHERE admitted_s IS NOT NULL"),
        "trained": count("SELECT count(*) FROM trainings WHERE undone IS NULL"),
        "committed": count(
            "SELECT count(*) FROM trainings WHERE undone IS NULL AND step <= "
            "(SELECT max(step) FROM checkpoints WHERE undone IS NULL)"
        ),
        "rolled back by a resume": count("SELECT count(*) FROM attempts WHERE undone IS NOT NULL"),
        "drivers": count("SELECT count(*) FROM runs"),
    }


def _reasons(db: sqlite3.Connection, ended: str) -> dict[str, int]:
    rows = db.execute(
        "SELECT reason, count(*) FROM attempts WHERE ended = ? AND undone IS NULL "
        "GROUP BY reason ORDER BY count(*) DESC",
        (ended,),
    )
    return dict(rows.fetchall())


def waste(db: sqlite3.Connection) -> tuple[dict[str, tuple[int, int, float]], dict[str, str]]:
    """What was generated and went into no gradient that counts, by kind, and an example of each.

    A rolled-back training was of use to nobody, so it is waste too.
    """
    rows = db.execute(
        "SELECT CASE WHEN undone IS NOT NULL THEN 'rolled back by a resume' ELSE ended END AS how, "
        "CASE WHEN undone IS NULL THEN coalesce(reason, '') END AS why, count(*), "
        "sum((SELECT sum(tokens) FROM samples s WHERE s.idx = a.idx AND s.attempt = a.attempt)), "
        "sum(coalesce(generate_s, ended_s - issued_s)) FROM attempts a "
        "WHERE undone IS NOT NULL OR ended IN ('failed', 'dropped') "
        "GROUP BY how, why ORDER BY how, why"
    )
    thrown: dict[str, tuple[int, int, float]] = {}
    examples: dict[str, str] = {}
    for how, why, n, tokens, seconds in rows:
        kind = how if why is None else f"{how}: {kind_of(why)}"
        before = thrown.get(kind, (0, 0, 0.0))
        thrown[kind] = (before[0] + n, before[1] + (tokens or 0), before[2] + (seconds or 0.0))
        if why is not None and why != kind_of(why):
            examples.setdefault(kind, why)
    return thrown, examples
