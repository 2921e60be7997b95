"""Files that are written whole, and what the disk does not take: one error that says what could not
be written, where and why."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from distrl.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EIO}
"""Beside a full disk: permissions, a read-only file system, a limit on file size, a fault."""

MIB = 2**20


class NotWritten(UserError, OSError):
    """A file could not be written; the message says which, why, and what to do. What was there
    before is as it was."""


@contextmanager
def writing(what: str, where: Path, then: str, needs: int = 0) -> Iterator[None]:
    """Within it, a disk that is full or refuses becomes NotWritten; other errors stay as they are.

    what: is written, as "the checkpoint of step 20"; then: what to do once there is room, as "go
    on with --resume"; needs: bytes of it, where known.
    """
    try:
        yield
    except NotWritten:
        raise
    except (OSError, SafetensorError) as error:
        number = number_of(error)
        if number not in FULL | REFUSED:
            raise
        asked = f", it needs about {needs / MIB:,.1f} MiB" if needs else ""
        raise NotWritten(
            f"{what} could not be written to {where}: {os.strerror(number)}{asked}"
            f"{_remedy(number, where)}, then {then}"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: under another name, which is then its own."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def full(error: BaseException) -> bool:
    """Whether a disk, or the user's share of it, is full: no fault of whoever wrote to it."""
    return number_of(error) in FULL


def number_of(error: BaseException) -> int:
    """The system's number of an error; 0 where it has none. safetensors has it in its text."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found and isinstance(error, SafetensorError) else 0


def _remedy(number: int, where: Path) -> str:
    if number not in FULL:
        return ". Let this user write there, or choose another run.root"
    there = next(place for place in (where, *where.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    return f" ({free / MIB:,.1f} MiB are free). Free some space there"
