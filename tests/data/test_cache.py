"""The cache against a real pip that serves from a folder: no connection needed."""

from __future__ import annotations

import shutil
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from distrl.data import cache
from distrl.data.cache import MANIFEST, built_folder, cache_folder, package_file, sha256_of
from distrl.data.errors import DataError

WHEEL = "tiny_thing-1.0-py3-none-any.whl"
REQUIREMENT = "tiny-thing==1.0"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTRL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel, the only place that pip looks at."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "tiny_thing-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def fetch(index: Path) -> Path:
    return package_file(REQUIREMENT, WHEEL, sha256_of(index / WHEEL), source=False)


def test_fetches_once_then_reuses(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch(index)
    assert path == cache_folder() / WHEEL
    assert path.read_bytes() == (index / WHEEL).read_bytes()
    monkeypatch.setattr(sys, "executable", "/no/python")
    assert fetch(index) == path
    assert {p.name for p in cache_folder().iterdir()} == {WHEEL, f".{WHEEL}.lock"}


def test_corrupt_file_is_fetched_again(index: Path) -> None:
    fetch(index).write_bytes(b"half a fi")
    assert fetch(index).read_bytes() == (index / WHEEL).read_bytes()


def test_half_that_a_killed_process_left_is_no_trouble(index: Path) -> None:
    part = cache_folder() / f".{WHEEL}.part"
    part.mkdir(parents=True)
    (part / WHEEL).write_bytes(b"half")
    assert fetch(index).read_bytes() == (index / WHEEL).read_bytes()
    assert not part.exists()


def test_wrong_hash_is_refused_and_leaves_nothing(index: Path) -> None:
    with pytest.raises(DataError, match="cannot fetch tiny_thing.*" + "0" * 64):
        package_file(REQUIREMENT, WHEEL, "0" * 64, source=False)
    assert not (cache_folder() / WHEEL).exists()


def test_another_file_than_expected_is_told(index: Path) -> None:
    with pytest.raises(DataError, match=r"the index gave no other\.whl with SHA-256"):
        package_file(REQUIREMENT, "other.whl", sha256_of(index / WHEEL), source=False)


def test_offline_error_says_how_to_place_the_file_and_that_works(index: Path) -> None:
    digest = sha256_of(index / WHEEL)
    kept = shutil.move(index / WHEEL, index.parent / "kept.whl")
    with pytest.raises(DataError) as caught:
        package_file(REQUIREMENT, WHEEL, digest, source=False)
    message = str(caught.value)
    for part in (
        "No matching distribution",
        "pip download --no-deps --only-binary :all: tiny-thing==1.0",
        digest,
        str(cache_folder()),
    ):
        assert part in message
    shutil.copy(kept, cache_folder() / WHEEL)
    assert package_file(REQUIREMENT, WHEEL, digest, source=False).is_file()


def test_python_without_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -I -S -m pip "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(DataError, match=r"No module named pip.*ensurepip"):
        package_file(REQUIREMENT, WHEEL, "0" * 64, source=False)


def test_slow_index_ends_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    monkeypatch.setattr(cache, "DOWNLOAD_TIMEOUT_S", 0.2)
    with pytest.raises(DataError, match=r"more than 0\.2 s"):
        package_file(REQUIREMENT, WHEEL, "0" * 64, source=False)


def test_unusable_cache_folder_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DISTRL_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set DISTRL_CACHE"):
        package_file(REQUIREMENT, WHEEL, "0" * 64, source=False)


def test_folder_is_built_once_though_two_ask_at_a_time() -> None:
    builds: list[Path] = []

    def build(folder: Path) -> None:
        builds.append(folder)
        time.sleep(0.2)
        (folder / "a.txt").write_text("alpha")

    threads = [threading.Thread(target=built_folder, args=("thing", build)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert (cache_folder() / "thing" / "a.txt").read_text() == "alpha"


def build_alpha(folder: Path) -> None:
    (folder / "a.txt").write_text("alpha")


@pytest.mark.parametrize("damage", ["changed", "gone", "unlisted", "torn list"])
def test_damaged_folder_is_built_anew(damage: str) -> None:
    folder = built_folder("thing", build_alpha)
    if damage == "changed":
        (folder / "a.txt").write_text("alphb")
    elif damage == "gone":
        (folder / "a.txt").unlink()
    elif damage == "unlisted":
        (folder / MANIFEST).unlink()
        (folder / "a.txt").write_text("?")
    else:
        (folder / MANIFEST).write_text("{")
        (folder / "a.txt").write_text("?")
    assert (built_folder("thing", build_alpha) / "a.txt").read_text() == "alpha"


def test_failed_build_leaves_nothing() -> None:
    def fail(folder: Path) -> None:
        (folder / "a.txt").write_text("half")
        raise RuntimeError("no more disk")

    with pytest.raises(RuntimeError, match="no more disk"):
        built_folder("thing", fail)
    assert {p.name for p in cache_folder().iterdir()} == {".thing.lock"}
