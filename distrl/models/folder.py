"""A folder that is either whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distrl.disk import writing

AGAIN = "give the same command again ('train' with --resume): what is finished is kept"


META_FILE = "distrl.json"
"""What distrl has to say of a model, beside its weights."""


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write in; it takes the place of `folder` at the end.

    Where the body raises, `folder` is left as it was. A folder cannot be renamed over one
    that holds files, so the old one steps aside first: a crash between the two renames
    leaves it whole under `.NAME.old`. Raises NotWritten where the disk is full or refuses.
    """
    with writing("the model", Path(folder), AGAIN):
        yield from _replacing(folder)


def _replacing(folder: Path) -> Iterator[Path]:
    folder = Path(os.path.abspath(folder))
    new, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)
