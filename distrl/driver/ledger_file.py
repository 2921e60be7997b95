"""The ledger's file: SQLite in WAL mode, its schema, and who may write to it.

    runs         a line for each driver that wrote here; its number is the fencing token
    attempts     one try at a prompt: when it was issued, who generated and scored it, its end
    samples      each sample of an attempt: tokens, version spans, finish reason, reward
    steps        learner steps: version before and after, the staleness bound that held
    trainings    which attempt went into which step's gradient
    checkpoints  committed steps, and the cursor below which all is settled
    events       lives of generators, scorers and learner; failures; changes of the bound

An attempt's row is filled in as the attempt goes on; all other rows are only added. What a
resume rolls back gets the number of the driver that did it in `undone`, and all that counts has
`undone IS NULL`. A training is *committed* when a live
checkpoint of its step or a later one is there.

A writer holds the highest number in `runs`; a driver that finds a higher one than its own has
been fenced off and must stop. Every transaction looks.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from distrl.driver.errors import DriverError

SCHEMA = 1
LEASE_S = 30.0
"""A writer on another machine that was not heard of for so long is taken to be gone."""

TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE runs (fence INTEGER PRIMARY KEY, host TEXT, pid INTEGER, began_s REAL, seen_s REAL,
    ended INTEGER, step INTEGER, cursor INTEGER);
CREATE TABLE attempts (idx INTEGER, attempt INTEGER, fence INTEGER, epoch INTEGER, prompt TEXT,
    issued_s REAL, generator TEXT, seed INTEGER, generated_s REAL, generate_s REAL, scorer TEXT,
    scored_s REAL, score_s REAL, admitted_s REAL, nbytes INTEGER, ended_s REAL, ended TEXT,
    reason TEXT, undone INTEGER, PRIMARY KEY (idx, attempt)) WITHOUT ROWID;
CREATE TABLE samples (idx INTEGER, attempt INTEGER, sample INTEGER, tokens INTEGER, finish TEXT,
    spans TEXT, reward REAL, parts TEXT, PRIMARY KEY (idx, attempt, sample)) WITHOUT ROWID;
CREATE TABLE steps (step INTEGER, fence INTEGER, version INTEGER, version_after INTEGER,
    bound INTEGER, learned_s REAL, undone INTEGER);
CREATE TABLE trainings (step INTEGER, idx INTEGER, attempt INTEGER, masked INTEGER,
    undone INTEGER);
CREATE TABLE checkpoints (step INTEGER, cursor INTEGER, fence INTEGER, at_s REAL,
    undone INTEGER);
CREATE TABLE events (fence INTEGER, at_s REAL, who TEXT, what TEXT, detail TEXT)
"""
COLUMNS = {"attempts": 19, "samples": 8, "steps": 7, "trainings": 5, "checkpoints": 5, "events": 5}
INSERTS = {
    table: f"INSERT OR REPLACE INTO {table} VALUES ({', '.join('?' * count)})"
    for table, count in COLUMNS.items()
}


OTHERWISE = "switch it off with --no-driver.ledger, or start anew with --fresh"


class LedgerError(DriverError):
    """The ledger cannot be read or written; the message says what to do."""


class Fenced(LedgerError):
    """Another driver has taken the run over."""


class LedgerFile:
    """The file, opened for writing by the driver that `fence` is the number of.

    Calls may come from any thread, one at a time.

    Attributes:
        run_id: identity of the run, made with the ledger.
        fence: this driver's number.
    """

    def __init__(
        self,
        path: Path,
        *,
        step: int = 0,
        cursor: int = 0,
        ahead: Collection[int] = (),
        run_id: str | None = None,
    ) -> None:
        """Open or create the ledger at `path`, and become its writer.

        The run goes on after `step`, with the prompts from `cursor` on but for those in `ahead`:
        whatever the ledger holds beyond that was not committed, and is rolled back. `run_id` is
        what the checkpoint that is resumed says of its ledger.
        Raises LedgerError, naming the other driver where one is alive.
        """
        self._path = path
        new = not path.exists() or _is_blank(path)
        if new and (step or cursor):
            raise LedgerError(
                f"{path} is missing, and the run goes on after step {step}: what became of the "
                f"prompts before it would be unknown. Put the ledger back, {OTHERWISE}"
            )
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            if not new:
                check_readable(self._db, path)
            self._configure(new=new)
            self.run_id = read_meta(self._db)["run_id"]
            if run_id is not None and run_id != self.run_id:
                raise LedgerError(
                    f"{path} is of another run ({self.run_id}) than the checkpoint ({run_id}); "
                    "put this run's own ledger back"
                )
            self.fence = self._take(step, cursor, ahead)
        except sqlite3.Error as error:
            self._db.close()
            raise LedgerError(
                f"{path} cannot be opened: {error}; is the disk full, or has another program got "
                "hold of the file?"
            ) from error
        except BaseException:
            self._db.close()
            raise

    def _configure(self, *, new: bool) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        if new:
            with _Transaction(self._db):
                for table in TABLES.split(";"):
                    self._db.execute(table)
                self._db.execute("INSERT INTO meta VALUES ('run_id', ?)", (uuid.uuid4().hex,))
                self._db.execute(f"PRAGMA user_version = {SCHEMA}")

    def _take(self, step: int, cursor: int, ahead: Collection[int]) -> int:
        """Take the next number, and roll back what was not committed."""
        with _Transaction(self._db):
            self._refuse_if_alive()
            self._refuse_gap(step)
            now = time.time()
            holder = (socket.gethostname(), os.getpid(), now, now, None, step, cursor)
            fence = self._db.execute(
                "INSERT INTO runs (host, pid, began_s, seen_s, ended, step, cursor) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                holder,
            ).lastrowid
            assert fence is not None
            self._roll_back(fence, step, cursor, ahead)
        return fence

    def _refuse_if_alive(self) -> None:
        last = self._db.execute(
            "SELECT host, pid, began_s, seen_s FROM runs WHERE ended IS NULL "
            "ORDER BY fence DESC LIMIT 1"
        ).fetchone()
        if last is None:
            return
        host, pid, began_s, seen_s = last
        here = host == socket.gethostname()
        alive = _is_alive(pid, began_s) if here else time.time() - seen_s < LEASE_S
        if alive and not (here and pid == os.getpid()):
            raise LedgerError(
                f"{self._path} is being written by process {pid} on {host} (last heard of "
                f"{time.time() - seen_s:.0f} s ago); stop that driver, or choose another --run.name"
            )

    def _refuse_gap(self, step: int) -> None:
        """What a run did with its ledger off is not in it, and cannot be told."""
        (known,) = self._db.execute("SELECT max(step) FROM steps WHERE undone IS NULL").fetchone()
        if (known or 0) < step:
            raise LedgerError(
                f"{self._path} ends with step {known or 0}, and the run goes on after step {step}: "
                f"it was off in between, and has a hole; {OTHERWISE}"
            )

    def _roll_back(self, fence: int, step: int, cursor: int, ahead: Collection[int]) -> None:
        spared = ",".join(str(index) for index in ahead)
        self._db.execute(
            f"UPDATE attempts SET undone = ? WHERE undone IS NULL AND idx >= ? "
            f"AND idx NOT IN ({spared})",
            (fence, cursor),
        )
        for table in ("steps", "trainings", "checkpoints"):
            self._db.execute(
                f"UPDATE {table} SET undone = ? WHERE undone IS NULL AND step > ?", (fence, step)
            )
        committed = self._db.execute(
            "SELECT 1 FROM checkpoints WHERE undone IS NULL AND step = ?", (step,)
        ).fetchone()
        if step and committed is None:  # its driver died between the checkpoint and its row
            row = (step, cursor, fence, time.time(), None)
            self._db.execute(INSERTS["checkpoints"], row)

    def attempts(self) -> dict[int, int]:
        """The highest attempt of every index that was rolled back."""
        found = self._db.execute(
            "SELECT idx, max(attempt) FROM attempts GROUP BY idx HAVING sum(undone IS NULL) = 0"
        )
        return dict(found.fetchall())

    def write(self, rows: Mapping[str, Iterable[Sequence[Any]]]) -> None:
        """Write rows by table, in one transaction that is on disk when this returns.

        Raises Fenced, or LedgerError where the disk refuses.
        """
        try:
            with _Transaction(self._db):
                self._check_fence()
                for table, lines in rows.items():
                    self._db.executemany(INSERTS[table], lines)
                self._db.execute(
                    "UPDATE runs SET seen_s = ? WHERE fence = ?", (time.time(), self.fence)
                )
        except sqlite3.Error as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: sqlite3.Error) -> LedgerError:
        return LedgerError(
            f"{self._path} cannot be written: {error}; is the disk full? The run can be "
            "resumed from its newest checkpoint"
        )

    def _check_fence(self) -> None:
        fence, host, pid = self._db.execute(
            "SELECT fence, host, pid FROM runs ORDER BY fence DESC LIMIT 1"
        ).fetchone()
        if fence != self.fence:
            raise Fenced(f"{self._path} was taken over by process {pid} on {host}; this one stops")

    def close(self) -> None:
        """Say that this driver has ended. May be called twice. Raises LedgerError."""
        try:
            self._db.execute("UPDATE runs SET ended = 1 WHERE fence = ?", (self.fence,))
        except sqlite3.ProgrammingError:  # closed before
            return
        except sqlite3.Error as error:
            raise self._unwritable(error) from error
        finally:
            self._db.close()


class _Transaction:
    """BEGIN IMMEDIATE … COMMIT, or ROLLBACK where the block raises."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:  # a full disk may have ended it
                self._db.execute("ROLLBACK")


def _is_blank(path: Path) -> bool:
    """Whether a file has no table: its first driver was ended before it had made them."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            return not db.execute("SELECT 1 FROM sqlite_master").fetchone()
    except sqlite3.Error:  # told by `check_readable`
        return False


def open_to_read(path: Path) -> closing[sqlite3.Connection]:
    """A read-only connection, as a context manager; the folder may be read-only too, where the
    last writer closed the file. Raises LedgerError."""
    if not path.exists():
        raise LedgerError(
            f"there is no ledger {path}; was this directory made by 'distrl train' or 'demo', "
            "with driver.ledger on?"
        )
    # To read, SQLite makes files beside it that say what others write; here nobody can.
    alone = not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists()
    db = sqlite3.connect(f"file:{path}?mode=ro{'&immutable=1' if alone else ''}", uri=True)
    try:
        check_readable(db, path)
    except BaseException:
        db.close()
        raise
    return closing(db)


def check_readable(db: sqlite3.Connection, path: Path) -> None:
    """Raise LedgerError where the file cannot be read, is damaged, of a newer schema, or not a
    ledger."""
    try:
        schema = db.execute("PRAGMA user_version").fetchone()[0]
        tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master")}
        trouble = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.OperationalError as error:  # what is wrong is not in the file
        raise LedgerError(
            f"{path} cannot be opened: {error}; let this user read it and write to its folder, or "
            "copy the folder to where that is so"
        ) from None
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"{path} is damaged ({error}); restore it from a copy") from None
    if schema > SCHEMA:
        raise LedgerError(
            f"{path} has schema {schema}, written by a newer distrl; this one reads up to "
            f"{SCHEMA}: upgrade it"
        )
    if missing := {"meta", "runs", *COLUMNS} - tables:
        raise LedgerError(f"{path} is not a ledger of distrl: it has no table {sorted(missing)}")
    if trouble != "ok":
        raise LedgerError(f"{path} is damaged ({trouble}); restore it from a copy")


def read_meta(db: sqlite3.Connection) -> dict[str, str]:
    return dict(db.execute("SELECT name, value FROM meta").fetchall())


def _is_alive(pid: int, began_s: float) -> bool:
    """Whether the process that wrote since `began_s` is there, and not another of its number."""
    try:
        return psutil.Process(pid).create_time() <= began_s
    except psutil.NoSuchProcess:
        return False
