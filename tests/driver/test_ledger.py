"""The ledger: what it keeps of a run, through faults, stops and crashes; who may write it."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import sqlite3
import time

import pytest

from distrl.driver import Start
from distrl.driver.audit import audit
from distrl.driver.ledger import FileLedger, spans_of, spans_text
from distrl.driver.ledger_file import Fenced, LedgerError, LedgerFile, _Transaction, open_to_read
from distrl.records import VersionSpan
from distrl.roles import LearnerFailed
from distrl.sim import FakeGenerator, FakeLearner, FakeScorer, Faults, log_normal


def query(path, sql):
    with open_to_read(path) as db:
        return db.execute(sql).fetchall()


def metrics_of(world, path):
    path.write_text("".join(f'{{"step": {step}}}\n' for step, _ in world.sink.rows))
    return path


def test_a_run_is_kept_from_issue_to_commit(world, tmp_path):
    run = world(steps=5, max_staleness=2)
    run.ledger = tmp_path / "ledger.sqlite"
    run.run()
    rows = query(run.ledger, "SELECT * FROM attempts")
    assert len(rows) == 20 and {row[16] for row in rows} == {"trained"}
    ordered = "SELECT count(*) FROM attempts WHERE issued_s <= generated_s AND generated_s <= " + (
        "scored_s AND scored_s <= admitted_s AND admitted_s <= ended_s"
    )
    assert query(run.ledger, ordered) == [(20,)]
    assert query(run.ledger, "SELECT step, cursor FROM checkpoints") == [(5, 20)]
    assert len(query(run.ledger, "SELECT * FROM samples")) == 40
    trained = query(run.ledger, "SELECT step, idx FROM trainings ORDER BY rowid")
    assert trained == [(seen.step, seen.index) for seen in run.learner.trained]
    report = audit(run.ledger, metrics_of(run, tmp_path / "metrics.jsonl"))
    assert report.holds, report.findings
    assert report.counts["committed"] == 20 and not report.waste


def test_failed_tries_are_attempts_and_given_up_prompts_are_drops(world, tmp_path):
    generators = [
        FakeGenerator("g0", faults=Faults(work={2: "fail", 5: "die"})),
        FakeGenerator("g1", faults=Faults(work={3: "fail", 7: "fail"}, load={3: "mismatch"})),
    ]
    scorers = [FakeScorer("s0", faults=Faults(work={4: "no_score", 5: "no_score"}))]
    run = world(steps=6, generators=generators, scorers=scorers, attempts=2)
    run.ledger = tmp_path / "ledger.sqlite"
    run.run()
    report = audit(run.ledger, metrics_of(run, tmp_path / "metrics.jsonl"))
    assert report.holds, report.findings
    drops = query(run.ledger, "SELECT count(*) FROM attempts WHERE ended = 'dropped'")
    assert drops == [(sum(run.summary.drops.values()),)]
    failed = query(run.ledger, "SELECT count(*) FROM attempts WHERE ended = 'failed'")[0][0]
    scorings = query(run.ledger, "SELECT count(*) FROM events WHERE what = 'gave no score'")[0][0]
    rows = run.column("driver/retries")
    assert failed >= 2 and failed + scorings >= rows[-1]
    lives = query(run.ledger, "SELECT who, what FROM events WHERE what IN ('lost', 'up')")
    assert ("g0", "lost") in lives and ("g0", "up") in lives
    assert report.counts["attempts"] == report.counts["prompts issued"] + failed


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("crash_at", [3, 6, 9])
def test_what_a_crash_leaves_uncommitted_is_tried_again(world, tmp_path, staleness, crash_at):
    """The learner dies in step `crash_at`; checkpoints are every 4 steps."""
    settings = {"steps": 11, "max_staleness": staleness, "checkpoint_every": 4}

    def parts(seed):
        seconds = [log_normal(1.0, 1.0, seed + i) for i in (0, 1)]
        return [FakeGenerator(f"g{i}", seconds=s) for i, s in enumerate(seconds)]

    first = world(generators=parts(1), learner=FakeLearner(fail=crash_at), **settings)
    first.ledger = tmp_path / "ledger.sqlite"
    with pytest.raises(LearnerFailed):
        first.run()
    saved = max(first.checkpoints.states, default=0)
    assert saved == (crash_at - 1) // 4 * 4
    start = None
    if saved:
        folder = first.checkpoints.folder / f"step_{saved:06d}"
        start = Start.from_state(first.checkpoints.states[saved], folder)
    second = world(generators=parts(5), start=start, **settings)
    second.ledger = first.ledger
    second.run()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {s}}}\n' for s in range(1, 12)))
    report = audit(second.ledger, metrics)
    assert report.holds, report.findings
    undone = crash_at - 1 - saved
    done_twice = "SELECT count(*) FROM trainings WHERE undone IS NOT NULL"
    assert query(second.ledger, done_twice) == [(4 * undone,)]
    assert report.counts["trained"] == 44 and report.counts["drivers"] == 2
    assert report.counts["rolled back by a resume"] >= 4 * undone
    again = query(second.ledger, "SELECT min(attempt) FROM attempts WHERE fence = 2 AND idx = 12")
    if saved <= 3 and crash_at > 3:
        assert again == [(2,)]


def test_a_commit_whose_row_was_lost_is_found_at_the_resume(world, tmp_path):
    first = world(steps=4)
    first.ledger = tmp_path / "ledger.sqlite"
    first.run()
    db = sqlite3.connect(first.ledger)
    db.execute("DELETE FROM checkpoints")
    db.commit()
    db.close()
    LedgerFile(first.ledger, step=4, cursor=16).close()
    assert query(first.ledger, "SELECT step, cursor, fence FROM checkpoints") == [(4, 16, 2)]


def test_two_drivers_the_second_is_refused_and_told_who_the_first_is(tmp_path):
    path = tmp_path / "ledger.sqlite"
    LedgerFile(path).close()
    live(path, socket.gethostname(), os.getppid())
    with pytest.raises(LedgerError, match=rf"written by process {os.getppid()} on "):
        LedgerFile(path)
    live(path, "another-host", 1)
    with pytest.raises(LedgerError, match="written by process 1 on another-host"):
        LedgerFile(path)


def test_a_driver_that_died_is_no_obstacle(tmp_path):
    path = tmp_path / "ledger.sqlite"
    LedgerFile(path).close()
    live(path, "another-host", 1, seen_s=time.time() - 3600)
    LedgerFile(path).close()
    live(path, socket.gethostname(), 2**22 + 1)  # beyond the largest process id
    LedgerFile(path).close()
    live(path, socket.gethostname(), os.getppid(), seen_s=1.0)  # its number was given anew since
    LedgerFile(path).close()


def live(path, host, pid, seen_s=None):
    db = sqlite3.connect(path)
    now = time.time() if seen_s is None else seen_s
    db.execute(
        "INSERT INTO runs (host, pid, began_s, seen_s, step, cursor) VALUES (?, ?, ?, ?, 0, 0)",
        (host, pid, now, now),
    )
    db.commit()
    db.close()


def test_a_driver_that_was_fenced_off_cannot_write(tmp_path):
    path = tmp_path / "ledger.sqlite"
    mine = LedgerFile(path)
    live(path, "another-host", 17)
    with pytest.raises(Fenced, match="taken over by process 17 on another-host"):
        mine.write({"events": [(1, 0.0, "g0", "up", "")]})
    mine.close()
    assert query(path, "SELECT count(*) FROM events") == [(0,)]


def test_bad_files_are_refused_and_left_alone(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with pytest.raises(LedgerError, match=r"no ledger .*was this directory made by"):
        open_to_read(path)
    with pytest.raises(LedgerError, match="is missing, and the run goes on after step 4"):
        LedgerFile(path, step=4, cursor=16)
    assert not path.exists()
    path.write_text("not a database, but long enough to be taken for one by its size" * 20)
    refused(path, "damaged")
    path.unlink()
    sqlite3.connect(path).execute("CREATE TABLE cheese (x)").close()
    refused(path, "not a ledger of distrl")


def test_a_truncated_ledger_and_one_of_a_newer_schema_are_refused(world, tmp_path):
    run = world(steps=8)
    run.ledger = tmp_path / "ledger.sqlite"
    run.run()
    whole = run.ledger.read_bytes()
    run.ledger.write_bytes(whole[: len(whole) // 2])
    refused(run.ledger, "damaged")
    run.ledger.write_bytes(whole)
    db = sqlite3.connect(run.ledger)
    db.execute("PRAGMA user_version = 99")
    db.close()
    refused(run.ledger, "schema 99, written by a newer distrl")


def refused(path, match):
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=match):
        open_to_read(path)
    with pytest.raises(LedgerError, match=match):
        LedgerFile(path)
    assert path.read_bytes() == before


def test_a_ledger_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    """As on a read-only disk. Of one that was not closed the last lines stand in another file."""
    path = tmp_path / "ledger.sqlite"
    file = LedgerFile(path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert query(path, "SELECT count(*) FROM runs") == [(1,)]
    file.close()
    with open_to_read(path) as db:
        assert db.execute("SELECT count(*) FROM runs").fetchall() == [(1,)]
        assert list(tmp_path.iterdir()) == [path]


def test_a_ledger_that_cannot_be_opened_is_not_called_damaged(tmp_path):
    path = tmp_path / "ledger.sqlite"
    LedgerFile(path).close()
    (tmp_path / "ledger.sqlite-wal").mkdir()
    refused(path, r"cannot be opened: unable to open database file; let this user")


@pytest.mark.parametrize("done", ["nothing", "a pragma"])
def test_a_ledger_that_was_hardly_begun_is_begun_again(tmp_path, done):
    """Its driver was ended before it had made the tables, all of them at once."""
    path = tmp_path / "ledger.sqlite"
    path.touch()
    if done == "a pragma":
        sqlite3.connect(path).execute("PRAGMA journal_mode = WAL").close()
    with pytest.raises(LedgerError, match="is missing, and the run goes on after step 4"):
        LedgerFile(path, step=4, cursor=16)
    file = LedgerFile(path)
    file.close()
    assert query(path, "SELECT value FROM meta WHERE name = 'run_id'") == [(file.run_id,)]


def test_steps_taken_while_it_was_off_are_told_before_the_run_goes_on(world, tmp_path):
    path = tmp_path / "ledger.sqlite"
    run = world(steps=4)
    run.ledger = path
    run.run()
    LedgerFile(path, step=4, cursor=16).close()
    with pytest.raises(LedgerError, match=r"ends with step 4, and the run goes on after step 6"):
        LedgerFile(path, step=6, cursor=24)
    LedgerFile(path, step=4, cursor=16).close()


def test_what_sqlite_will_not_do_is_told_with_the_file(tmp_path, monkeypatch):
    path = tmp_path / "ledger.sqlite"
    file = LedgerFile(path)
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, timeout=0.01))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match=r"ledger\.sqlite cannot be opened: database is locked"):
        LedgerFile(path)
    file._db.execute("PRAGMA busy_timeout = 10")
    with pytest.raises(LedgerError, match=r"ledger\.sqlite cannot be written: database is locked"):
        file.close()
    other.close()


def test_a_write_that_fails_halfway_leaves_nothing_and_keeps_no_lock(tmp_path):
    path = tmp_path / "ledger.sqlite"
    file = LedgerFile(path)
    (pages,) = file._db.execute("PRAGMA page_count").fetchone()
    file._db.execute(f"PRAGMA max_page_count = {pages + 4}")
    rows = [(1, 0.0, "g0", "up", "x" * 1000)] * 100
    with pytest.raises(LedgerError, match="database or disk is full"):
        file.write({"events": rows})
    file.write({"events": rows[:1]})
    file.close()
    assert query(path, "SELECT count(*) FROM events") == [(1,)]


def test_a_ledger_from_another_run_is_refused(tmp_path):
    for name in ("a", "b"):
        LedgerFile(tmp_path / name).close()
    mine = query(tmp_path / "a", "SELECT value FROM meta")[0][0]
    LedgerFile(tmp_path / "a", run_id=mine).close()
    with pytest.raises(LedgerError, match="is of another run"):
        LedgerFile(tmp_path / "b", run_id=mine)
    with pytest.raises(LedgerError, match="is of another run"):
        audit(tmp_path / "b", tmp_path / "metrics.jsonl", run_id=mine)


def test_a_flush_that_is_cancelled_is_waited_for(tmp_path, monkeypatch):
    """Its thread goes on writing; who writes next may not meet it in the file."""
    ledger = FileLedger(LedgerFile(tmp_path / "ledger.sqlite"), time.monotonic)
    write = ledger._write

    def slowly(*rows):
        with _Transaction(ledger._file._db):
            time.sleep(0.2)
        write(*rows)

    async def end_of_a_run():
        ledger.event("driver", "began")
        flushing = asyncio.ensure_future(ledger.flush())
        await asyncio.sleep(0.05)
        flushing.cancel()
        await ledger.flush()
        await asyncio.wait({flushing})
        assert flushing.cancelled()

    monkeypatch.setattr(ledger, "_write", slowly)
    asyncio.run(end_of_a_run())
    monkeypatch.undo()
    ledger.close()
    assert query(tmp_path / "ledger.sqlite", "SELECT what FROM events") == [("began",)]


def test_a_flush_that_is_cancelled_and_fails_says_so(tmp_path, monkeypatch):
    """What it was to write is in no queue any more."""
    ledger = FileLedger(LedgerFile(tmp_path / "ledger.sqlite"), time.monotonic)

    def fails(*rows):
        time.sleep(0.1)
        raise LedgerError("the disk is full")

    async def end_of_a_run():
        flushing = asyncio.ensure_future(ledger.flush())
        await asyncio.sleep(0.02)
        flushing.cancel()
        with pytest.raises(LedgerError, match="the disk is full"):
            await flushing

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "_write", fails)
        asyncio.run(end_of_a_run())
    ledger.close()


def test_spans_survive_as_text():
    spans = (VersionSpan(version=3, start=0, end=17), VersionSpan(version=4, start=17, end=40))
    assert spans_text(spans) == "3:0-17 4:17-40"
    assert spans_of(spans_text(spans)) == spans
