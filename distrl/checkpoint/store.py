"""Checkpoints: a folder a step, committed in an order that a crash cannot tear.

The order of a commit, each step on disk (fsync) before the next begins:

1. the caller's files, in `step_000050.tmp-<pid>`
2. `manifest.json`: schema, step, the caller's state, size and SHA-256 of every file
3. the folder's rename to `step_000050`
4. `COMMITTED`, which holds the SHA-256 of the manifest and makes the checkpoint count
5. only then, the removal of the oldest ones (marker first)

Invariant: whatever moment the process dies at, each folder with a marker is whole, and
the newest of them is never older than the last `commit` that returned. What the disk
itself destroys later is found by the hashes: `latest` skips such a checkpoint, says so
loudly, and falls back to the one before. One process writes; others may read meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrl.disk import writing
from distrl.errors import UserError

logger = logging.getLogger(__name__)

SCHEMA = 1
MANIFEST = "manifest.json"
MARKER = "COMMITTED"
_STEP = re.compile(r"step_(\d{6,})")
_TEMPORARY = re.compile(r"step_\d{6,}\.tmp-\d+")


class CheckpointError(UserError):
    """A checkpoint cannot be written, or none can be read; the message says what to do."""


class _Torn(Exception):
    """One checkpoint is not whole; the message names the file and the trouble."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A verified checkpoint: its step, its folder, and the state given to `commit`."""

    step: int
    path: Path
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints in `folder`, of which the newest `keep` stay.

    Writing: `path = begin(step)`, fill the folder (from any process), then
    `commit(step, state)`; or `with write(step, state) as path`. A `begin` discards a
    write that was never committed. All calls block: use a thread from asyncio.
    """

    def __init__(self, folder: Path, keep: int = 2, first_bytes: int = 0) -> None:
        """first_bytes: what the first one takes at least, where that is known."""
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint has to stay")
        self.folder, self.keep, self._first_bytes = folder, keep, first_bytes
        self._torn: set[int] = set()

    def begin(self, step: int) -> Path:
        """An empty folder to write step `step` into.

        Raises CheckpointError where the disk has not the room (`check_space`), or where `step`
        is committed already, and NotWritten where the disk refuses.
        """
        with self._writing(step):
            return self._begin(step)

    def _begin(self, step: int) -> Path:
        self.check_space()
        final = self._path(step)
        if final.exists():
            try:
                _verified(final, step)
            except _Torn as torn:
                logger.warning("replacing checkpoint %s: %s", final, torn)
            else:
                raise CheckpointError(f"{final} is committed already; resume from it instead")
        temporary = self._temporary(step)
        temporary.mkdir()
        return temporary

    def commit(self, step: int, state: Mapping[str, Any]) -> Path:
        """Make what was written since `begin(step)` the newest checkpoint.

        Args:
            state: small JSON values kept in the manifest (cursor, version, W&B id, …).

        Raises NotWritten where the disk is full or refuses: the newest one is then what it was.
        """
        with self._writing(step):
            return self._commit(step, state)

    def _commit(self, step: int, state: Mapping[str, Any]) -> Path:
        temporary, final = self._temporary(step), self._path(step)
        manifest = _write_manifest(temporary, step, state)
        _fsync_tree(temporary)
        if final.exists():  # torn, or `begin` would have refused
            _remove(final)
        temporary.rename(final)
        _fsync(self.folder)
        _write_marker(final, manifest)
        self._retain(step)
        return final

    @contextmanager
    def write(self, step: int, state: Mapping[str, Any]) -> Iterator[Path]:
        """`begin`, and `commit` on a clean exit; an exception leaves no trace.

        `state` is read on exit, so it may be filled inside the block.
        """
        path = self.begin(step)
        try:
            yield path
            self.commit(step, state)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, every file hashed. Raises CheckpointError where there is none
        or it is not whole; the message lists those there are."""
        try:
            return _verified(self._path(step), step)
        except _Torn as torn:
            there = ", ".join(map(str, self.committed())) or "none"
            raise CheckpointError(
                f"{self.folder} has no whole checkpoint of step {step} ({torn}); there are: {there}"
            ) from None

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, every file hashed; None where none was made.

        Raises CheckpointError where checkpoints exist and none is whole: to start afresh
        would silently throw the run away.
        """
        steps = self._steps()
        torn = []
        for step in reversed(steps):
            path = self._path(step)
            try:
                return _verified(path, step)
            except _Torn as error:
                torn.append(f"{path.name}: {error}")
                self._torn.add(step)
                logger.warning("skipping torn checkpoint %s: %s", path, error)
        # A folder that never got its marker is the first commit of a run, cut short.
        if any((self._path(step) / MARKER).exists() for step in steps):
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be loaded:\n  "
                + "\n  ".join(torn)
                + "\nRestore one from a copy, or start the run anew with --fresh"
            )
        return None

    def newest_state(self) -> dict[str, Any] | None:
        """What the newest checkpoint says, without a look at its files; None where there is none
        that can be read."""
        for step in reversed(self.committed()):
            try:
                return _manifest(self._path(step), step)["state"]
            except _Torn:
                continue
        return None

    def committed(self) -> list[int]:
        """Steps with a commit marker, oldest first; their files are not verified."""
        return [step for step in self._steps() if (self._path(step) / MARKER).exists()]

    def clean(self) -> None:
        """Remove what crashes left: temporary folders, and folders without a marker.

        Only the process that writes may call this.
        """
        for path in self.folder.glob("step_*"):
            unmarked = _STEP.fullmatch(path.name) and not (path / MARKER).exists()
            if unmarked or _TEMPORARY.fullmatch(path.name):
                shutil.rmtree(path)

    def _retain(self, step: int) -> None:
        """Keep the newest `keep` up to `step`, torn ones not counted. Later ones belong to a
        course that was abandoned when an earlier one was resumed: left there, they would
        be taken for the newest."""
        self._torn.discard(step)
        committed = self.committed()
        useless = [s for s in committed if s > step or s in self._torn]
        for old in useless:
            logger.warning("removing checkpoint %d: torn, or from before the run went back", old)
        good = [s for s in committed if s not in useless]
        for old in useless + good[: -self.keep]:
            _remove(self._path(old))

    def check_space(self) -> None:
        """The last checkpoint's size, and a tenth, has to be free, or `first_bytes`; what crashes
        left is removed before. Raises CheckpointError. Only the process that writes may call it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clean()
        needed = self._needed()
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"a checkpoint needs about {needed / 2**20:,.1f} MiB and {self.folder} has "
                f"{free / 2**20:,.1f} MiB free; free some, or put run.root on a larger disk"
            )

    def _needed(self) -> int:
        """Bytes of the next checkpoint, about; 0 where nothing is known of it."""
        committed = self.committed()
        if not committed:
            return self._first_bytes
        last = self._path(committed[-1])
        return int(1.1 * sum(f.stat().st_size for f in last.rglob("*") if f.is_file()))

    def _writing(self, step: int) -> AbstractContextManager[None]:
        then = "go on with --resume: the checkpoints before it are whole"
        return writing(f"the checkpoint of step {step}", self.folder, then, self._needed())

    def _steps(self) -> list[int]:
        names = (_STEP.fullmatch(p.name) for p in self.folder.glob("step_*") if p.is_dir())
        return sorted(int(match[1]) for match in names if match)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}"

    def _temporary(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.tmp-{os.getpid()}"


def _write_manifest(folder: Path, step: int, state: Mapping[str, Any]) -> bytes:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    body = {"schema": SCHEMA, "step": step, "state": dict(state), "files": files}
    manifest = json.dumps(body, indent=1).encode()
    (folder / MANIFEST).write_bytes(manifest)
    return manifest


def _write_marker(folder: Path, manifest: bytes) -> None:
    temporary = folder / f"{MARKER}.tmp"
    temporary.write_text(hashlib.sha256(manifest).hexdigest())
    _fsync(temporary)
    temporary.replace(folder / MARKER)
    _fsync(folder)


def _verified(folder: Path, step: int) -> Checkpoint:
    """The checkpoint in `folder`. Raises _Torn at the first thing amiss."""
    body = _manifest(folder, step)
    for name, expected in body["files"].items():
        _verify_file(folder / name, name, expected)
    return Checkpoint(step=step, path=folder, state=body["state"])


def _manifest(folder: Path, step: int) -> dict[str, Any]:
    """What was committed in `folder`. Raises _Torn, or CheckpointError at a newer distrl's."""
    marker, manifest = _read(folder, MARKER), _read(folder, MANIFEST)
    if hashlib.sha256(manifest).hexdigest().encode() != marker:
        raise _Torn(f"{MANIFEST} is not the one that {MARKER} was written for")
    body = json.loads(manifest)
    if body["schema"] > SCHEMA:
        raise CheckpointError(
            f"{folder} has schema {body['schema']}, written by a newer distrl; "
            f"this one reads up to {SCHEMA}: upgrade it"
        )
    if body["step"] != step:
        raise _Torn(f"{MANIFEST} is of step {body['step']}; was the folder renamed?")
    return body


def _verify_file(path: Path, name: str, expected: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise _Torn(f"{name} has {size} bytes instead of {expected['bytes']}")
        if _sha256(path) != expected["sha256"]:
            raise _Torn(f"{name} has other contents than were written (SHA-256)")
    except OSError as error:
        raise _Torn(f"{name} cannot be read: {error.strerror}") from None


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise _Torn(f"{name} cannot be read: {error.strerror}") from None


def _remove(folder: Path) -> None:
    (folder / MARKER).unlink(missing_ok=True)
    _fsync(folder)
    shutil.rmtree(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
