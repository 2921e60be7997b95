"""The check at the end of every session finds what it looks for."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from distrl.actors.cluster import SCRATCH
from distrl.actors.process import remove
from distrl.generate.engine import SOCKETS
from distrl.records import Receiver
from distrl.sync import collective
from distrl.sync.image import Image
from distrl.sync.memory import NAME, SharedMemoryPublisher
from tests import leftovers

QUEUE = """
from multiprocessing import resource_tracker, shared_memory
queue = shared_memory.SharedMemory(create=True, size=100)
resource_tracker.unregister(queue._name, "shared_memory")  # as where the tracker is killed
print(queue.name, flush=True)
input()
"""


@contextmanager
def child(code: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that runs `code`, and its first line."""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_names_are_those_that_the_code_gives() -> None:
    assert leftovers.FOLDERS == (SCRATCH, SOCKETS)
    assert f"/memfd:{NAME}" == leftovers.MEMORY_FILE


def test_a_file_in_shared_memory_is_found_once_nobody_maps_it() -> None:
    shared = leftovers.SharedFiles()
    with child(QUEUE) as (_, name):
        path = Path("/dev/shm", name)
        shared.look()
        assert str(path) not in shared.left(), "it is still in use"
    try:
        assert shared.left() == [str(path)]
    finally:
        remove(path)
    assert shared.left() == []


def test_weights_that_are_still_held_are_found() -> None:
    before = set(leftovers.memory_files())
    publisher = SharedMemoryPublisher()
    publisher.publish({"weight": torch.zeros(3)}, 1)
    assert len(set(leftovers.memory_files()) - before) == 1
    publisher.close()
    assert set(leftovers.memory_files()) <= before


def test_a_thread_that_waits_for_an_engine_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    before, may_end = set(leftovers.senders()), threading.Event()

    def nobody_comes(*_: object) -> Any:
        may_end.wait(60)
        raise OSError("nobody came")

    monkeypatch.setitem(collective.MEET, "gloo", nobody_comes)
    receiver = Receiver(name="g7", start=1, workers=1, near=True, timeout_s=0.1)
    line = collective.Line("gloo", receiver, "127.0.0.1")
    line._image = cast("Image", ())
    with pytest.raises(collective.TransferFailed, match="did not come"):
        line.send()
    assert set(leftovers.senders()) - before == {"to g7 (start 1)"}
    may_end.set()


def test_folders_of_this_process_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert leftovers.folders() == []
    mine = [Path(tempfile.mkdtemp(prefix=f"{p}{os.getpid()}-")) for p in (SCRATCH, SOCKETS)]
    Path(tempfile.mkdtemp(prefix=f"{SCRATCH}1-"))
    assert leftovers.folders() == mine


def test_a_process_is_found_whoever_its_parent_is() -> None:
    orphan = "import subprocess as s; print(s.Popen(['sleep', '987'], stdout=s.DEVNULL).pid)"
    with child(orphan) as (process, pid):
        process.wait()
        try:
            assert f"{pid} sleep 987" in leftovers.processes()
        finally:
            subprocess.run(["kill", pid], check=True)
