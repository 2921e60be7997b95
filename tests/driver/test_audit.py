"""The audit finds each breach that is planted in the ledger of a good run."""

from __future__ import annotations

import asyncio
import sqlite3

import pytest

from distrl.driver import audit as audits
from distrl.driver.audit import audit
from distrl.driver.ledger_file import LedgerFile
from distrl.metrics import ListSink
from distrl.roles import LearnerFailed
from distrl.sim import FakeGenerator, FakeLearner, FakeScorer, Faults, fixed, log_normal


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


class Watched(ListSink):
    """Rows on disk; all that is there is audited after each of them, and after each write of the
    ledger: at every moment at which a run could be killed, or looked at.

    Attributes:
        broken: what was found, by the promise.
        told: what was said of open steps; last: of the rows, the last time.
    """

    def __init__(self, ledger, metrics, monkeypatch):
        super().__init__()
        self.broken, self.told, self.last = {}, [], ""
        self._ledger, self._metrics = ledger, metrics
        metrics.touch()
        write = LedgerFile.write

        def watched(file, rows):
            write(file, rows)
            self.look()

        monkeypatch.setattr(LedgerFile, "write", watched)

    def log(self, step, values):
        super().log(step, values)
        with self._metrics.open("a") as file:
            file.write(f'{{"step": {step}}}\n')
        self.look()

    def look(self):
        report = audit(self._ledger, self._metrics)
        for finding in report.findings:
            if not finding.holds:
                self.broken.setdefault(finding.promise, finding.offenders)
            if finding.promise.startswith(METRICS):
                self.last, *told = finding.seen.split("; ")
                self.told += told


def uneven(seed):
    """Generators that take as long as a response is; the responses are of 5 to 105 tokens."""

    def length(prompt):
        return 5 + (37 * prompt.index + seed) % 101

    def generator(name):
        made = FakeGenerator(name, length=length)
        generate = made.generate

        async def as_long(prompt):
            made._seconds = fixed(length(prompt) / 10)
            return await generate(prompt)

        made.generate = as_long
        return made

    return [generator("g0"), generator("g1")]


def slow_loads():
    return {"generators": [FakeGenerator("g0", load_seconds=fixed(2.5))]}


def quick_steps():
    """Several to a second."""
    return {
        "generators": [FakeGenerator(f"g{i}", seconds=fixed(0.01)) for i in range(4)],
        "scorers": [FakeScorer("s0", seconds=fixed(0.01))],
        "learner": FakeLearner(seconds=fixed(0.1)),
    }


def uneven_lengths():
    """Many short responses are there of prompts after the last one trained on."""
    return {
        "steps": 20,
        "generators": uneven(3),
        "learner": FakeLearner(seconds=fixed(0.1)),
        "max_staleness": 8,
        "prompts_per_step": 16,
    }


def overtaking():
    return {"generators": uneven(1), "lead": 4, "max_staleness": 4, "window": 6}


def faults():
    generators = [
        FakeGenerator(f"g{i}", seconds=log_normal(3.0, 0.5, i), faults=Faults(rate=0.2, seed=i))
        for i in range(3)
    ]
    scorers = [FakeScorer("s0", faults=Faults(rate=0.3, seed=5))]
    return {"generators": generators, "scorers": scorers, "attempts": 2, "max_restarts": 50}


NO_ROW, NOT_WRITTEN = "it has no row yet", "the ledger was not written since"


@pytest.mark.parametrize("end", ["well", "stopped", "failed"])
@pytest.mark.parametrize(
    ("life", "told"),
    [
        (slow_loads, NO_ROW),
        (quick_steps, NOT_WRITTEN),
        (uneven_lengths, ""),
        (overtaking, ""),
        (faults, ""),
    ],
)
def test_a_sound_run_is_broken_at_no_moment(world, tmp_path, monkeypatch, life, told, end):
    settings = {"steps": 9, "max_staleness": 2, "checkpoint_every": 4, **life()}
    if end == "failed":
        settings["learner"] = FakeLearner(seconds=fixed(0.1), fail=7)
    run = world(**settings)
    run.ledger = tmp_path / "ledger.sqlite"
    run.sink = Watched(run.ledger, tmp_path / "metrics.jsonl", monkeypatch)

    async def stop(driver):
        while len(run.sink.rows) < 5:
            await asyncio.sleep(0.3)
        driver.stop()

    if end == "failed":
        with pytest.raises(LearnerFailed):
            run.run()
    else:
        run.run(stop if end == "stopped" else None)
    run.sink.look()
    assert run.sink.broken == {}
    assert not told or any(said.endswith(told) for said in run.sink.told)
    if end != "failed":
        assert run.sink.last == f"{len(run.sink.rows)} rows", "nothing is open after a good end"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (range(1, 12), f"11 rows; step 12 is still open: {NO_ROW}"),
        (
            range(1, 11),
            f"10 rows; step 11 is still open: {NO_ROW}; step 12 is still open: {NO_ROW}",
        ),
        (range(1, 10), "step 10 is not in metrics.jsonl"),
        ([*range(1, 11), 12], "step 11 is not in metrics.jsonl"),
        (range(1, 14), f"13 rows; step 13 is still open: {NOT_WRITTEN}"),
        ([*range(1, 13), 14], "step 13 was never taken"),
    ],
)
def test_only_the_end_of_a_run_that_did_not_end_may_be_on_one_side(good, rows, said):
    ledger, metrics = good
    change(ledger, "UPDATE runs SET ended = NULL")
    change(ledger, "DELETE FROM checkpoints WHERE step > 5")
    metrics.write_text("".join(f'{{"step": {step}}}\n' for step in rows))
    report = audit(ledger, metrics)
    found = next(f for f in report.findings if f.promise.startswith(METRICS))
    assert said in (found.offenders or (found.seen,))
    assert not audit(ledger, metrics, committed=13).holds, "a checkpoint has both before it"


def test_a_step_since_the_last_write_of_a_driver_that_ended_is_a_breach(good):
    ledger, metrics = good
    with metrics.open("a") as file:
        file.write('{"step": 13}\n')
    assert broken(ledger, metrics)[METRICS] == "step 13 is not in the ledger"


def test_a_run_whose_actors_only_start_has_no_metrics_yet(tmp_path):
    LedgerFile(tmp_path / "ledger.sqlite").close()
    assert audit(tmp_path / "ledger.sqlite", tmp_path / "metrics.jsonl").holds


def test_all_that_is_read_is_of_one_moment(good, monkeypatch):
    """A run that is alive writes on while its ledger is read."""
    ledger, metrics = good
    first = audits.exactly_once

    def written_meanwhile(db):
        change(ledger, "UPDATE steps SET bound = 0")
        return first(db)

    monkeypatch.setattr(audits, "exactly_once", written_meanwhile)
    assert audit(ledger, metrics).holds
    assert YOUNG in broken(ledger, metrics)


def change(ledger, sql):
    db = sqlite3.connect(ledger)
    db.execute(sql)
    db.commit()
    db.close()
