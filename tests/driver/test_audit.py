"""The audit finds each breach that is planted in the ledger of a good run."""

from __future__ import annotations

import sqlite3

import pytest

from distrl.driver.audit import audit
from distrl.sim import FakeGenerator, FakeScorer, Faults, log_normal


@pytest.fixture
def good(world, tmp_path):
    """A finished run with drops, retries and stale tokens: its ledger and its metrics."""
    generators = [
        FakeGenerator(
            f"g{i}",
            seconds=log_normal(3.0, 0.5, i),
            length=lambda prompt: 5 + prompt.index % 7,
            faults=Faults(rate=0.1, seed=i),
        )
        for i in range(3)
    ]
    scorers = [FakeScorer("s0", faults=Faults(rate=0.3, seed=5))]
    run = world(
        steps=12, max_staleness=2, generators=generators, scorers=scorers, attempts=2,
        checkpoint_every=5, max_restarts=50,
    )  # fmt: skip
    run.ledger = tmp_path / "ledger.sqlite"
    run.run()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {step}}}\n' for step, _ in run.sink.rows))
    return run.ledger, metrics


def broken(ledger, metrics):
    """The promises that the audit finds broken, with the first offender."""
    report = audit(ledger, metrics)
    return {f.promise.split(",")[0]: f.offenders[0] for f in report.findings if not f.holds}


def test_a_good_run_keeps_every_promise(good):
    report = audit(*good)
    assert report.holds and broken(*good) == {}
    assert report.counts["trained"] == report.counts["committed"] == 48
    assert sum(report.drops.values()) > 0 and sum(report.retries.values()) > 0
    thrown = sum(attempts for attempts, _, _ in report.waste.values())
    assert thrown == report.counts["attempts"] - 48


EXACTLY = "every issued prompt was trained exactly once"
ONE = "no sample is in two gradient steps"
YOUNG = "no token was older than the staleness bound at its gradient"
ASCEND = "versions ascend on each generator"
METRICS = "metrics.jsonl has every learner step once"
LENGTHS = "trained lengths are distributed as generated lengths (Kolmogorov-Smirnov)"


@pytest.mark.parametrize(
    ("sql", "promise", "offender"),
    [
        ("DELETE FROM trainings WHERE idx = 9", EXACTLY, "prompt 9 was neither trained nor"),
        ("DELETE FROM attempts WHERE idx = 9", EXACTLY, "prompt 9 was never issued"),
        (
            "INSERT INTO trainings SELECT step + 1, idx, attempt, 0, NULL FROM trainings "
            "WHERE idx = 9",
            ONE,
            "prompt 9, attempt",
        ),
        (
            "INSERT INTO trainings SELECT step + 1, idx, attempt, 0, NULL FROM trainings "
            "WHERE idx = 9",
            EXACTLY,
            "prompt 9: trained in step",
        ),
        (
            "UPDATE attempts SET admitted_s = NULL WHERE idx = 9",
            ONE,
            "trained on prompt 9, attempt",
        ),
        (
            "UPDATE samples SET spans = '0:0-' || tokens WHERE idx = (SELECT max(idx) FROM "
            "trainings) AND sample = 1",
            YOUNG,
            "step 12, prompt ",
        ),
        ("UPDATE steps SET bound = 0 WHERE step = 6", YOUNG, "step 6, prompt "),
        ("UPDATE steps SET version = 0 WHERE step = 6", YOUNG, "step 6, prompt "),
        ("DELETE FROM samples WHERE idx = 9", YOUNG, "prompt 9: no version spans"),
        (
            "INSERT INTO events VALUES (1, 1e9, 'g1', 'loaded', '3')",
            ASCEND,
            "g1 went from version 12 back to 3",
        ),
        (
            "UPDATE samples SET spans = '2:0-1 1:1-' || tokens WHERE idx = 9 AND sample = 0",
            ASCEND,
            "prompt 9, attempt",
        ),
        ("DELETE FROM steps WHERE step = 6", METRICS, "step 6 is not in the ledger"),
        ("INSERT INTO steps SELECT * FROM steps WHERE step = 6", METRICS, "step 6 is in the"),
    ],
)
def test_a_planted_breach_is_found(good, sql, promise, offender):
    ledger, metrics = good
    db = sqlite3.connect(ledger)
    assert db.execute(sql).rowcount > 0
    db.commit()
    db.close()
    found = broken(ledger, metrics)
    assert offender in found[promise]
    assert not audit(ledger, metrics).holds


def test_a_bias_towards_short_responses_is_found(world, tmp_path):
    """A run in which long groups mostly fail, as a discard of stragglers would have it."""
    run = world(steps=40, prompts_per_step=8, attempts=1)
    run.ledger = tmp_path / "ledger.sqlite"
    lengths = {index: 5 + index % 40 for index in range(10_000)}

    class Impatient(FakeScorer):
        async def score(self, group):
            if lengths[group.info.index] > 15 and group.info.index % 3:
                self._faults = Faults(rate=1.0)
            try:
                return await super().score(group)
            finally:
                self._faults = Faults()

    run.scorers = [Impatient("s0")]
    run.generators = [FakeGenerator("g0", length=lambda prompt: lengths[prompt.index])]
    run.run()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {step}}}\n' for step, _ in run.sink.rows))
    found = broken(run.ledger, metrics)
    assert set(found) == {LENGTHS} and "tokens on average" in found[LENGTHS]


@pytest.mark.parametrize(
    ("spoil", "offender"),
    [
        (lambda rows: rows[:4] + rows[5:], "step 5 is not in metrics.jsonl"),
        (lambda rows: [*rows, rows[2]], "step 3 is in metrics.jsonl 2 times"),
        (lambda rows: [*rows, '{"step": 99}'], "step 99 is not in the ledger"),
        (lambda rows: ["{", *rows], "line 1 of metrics.jsonl is not a metrics row"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "step 1 follows step 2"),
    ],
)
def test_gaps_and_doubles_in_the_metrics_are_found(good, spoil, offender):
    ledger, metrics = good
    metrics.write_text("\n".join(spoil(metrics.read_text().splitlines())) + "\n")
    found = broken(ledger, metrics)
    assert set(found) == {METRICS} and offender in found[METRICS]


def test_missing_metrics_are_said(good):
    ledger, metrics = good
    metrics.unlink()
    assert "there is no metrics.jsonl" in broken(ledger, metrics)[METRICS]


def test_what_a_resume_rolled_back_counts_for_no_length(good):
    """It was generated again, so a stretch of longer responses would stand there twice."""
    ledger, metrics = good
    before = audit(ledger, metrics)
    db = sqlite3.connect(ledger)
    db.execute(
        "INSERT INTO samples SELECT idx, attempt + 50, sample, tokens * 9, finish, spans, reward, "
        "parts FROM samples"
    )
    columns = [str(name) for _, name, *_ in db.execute("PRAGMA table_info(attempts)")]
    other = {"attempt": "attempt + 50", "undone": "1"}
    copied = [other.get(name, name) for name in columns]
    db.execute(f"INSERT INTO attempts SELECT {', '.join(copied)} FROM attempts")
    db.commit()
    db.close()
    after = audit(ledger, metrics)
    seen = [
        next(f.seen for f in report.findings if f.promise == LENGTHS) for report in (before, after)
    ]
    assert seen[0] == seen[1] and LENGTHS not in broken(ledger, metrics)
