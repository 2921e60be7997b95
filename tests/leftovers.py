"""What tests could leave behind: processes, files in shared memory, memory files, folders."""

from __future__ import annotations

import gc
import os
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "DISTRL_TEST_SESSION"
SESSION = uuid.uuid4().hex
"""The mark's value, which every process has in its environment that this session starts."""

MEMORY_FILE = "/memfd:distrl-weights"
FOLDERS = ("distrl-ray-", "distrl-vllm-")
SENDER = "to "
"""As sync/memory.py, actors/cluster.py, generate/engine.py and sync/collective.py name them, none
of which is imported here: most sessions need neither Ray nor torch. test_leftovers.py compares."""

SHARED = re.compile(r"/dev/shm/\S+")
LOOK_EVERY_S = 3.0
"""A look takes 40 ms of a core."""


class SharedFiles:
    """The files in shared memory (vLLM's message queues, semaphores) that processes of this session
    are seen to map. Other sessions have files there too, so names alone would not tell."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._over = threading.Event()

    def watch(self) -> None:
        """Look again and again, in a thread of its own, until `left` is asked for."""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            self.look()

    def look(self) -> None:
        self._seen |= {path for process in started() for path in mapped(process.pid)}

    def left(self) -> list[str]:
        """Those that are still there and that no process of this session maps any more."""
        self._over.set()
        used = {path for pid in (os.getpid(), *(p.pid for p in started())) for path in mapped(pid)}
        return sorted(path for path in self._seen - used if Path(path).exists())


def mapped(pid: int) -> set[str]:
    """Files in shared memory that a process maps."""
    with suppress(OSError):
        return set(SHARED.findall(Path(f"/proc/{pid}/maps").read_text()))
    return set()


def memory_files() -> list[str]:
    """Images of weights that this process still holds: they take memory until it ends."""
    gc.collect()
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if os.readlink(descriptor).startswith(MEMORY_FILE):
                found.append(str(descriptor))
    return found


def senders() -> list[str]:
    """Threads of a learner that still wait for an engine, by name: one that is inside the library
    when Python ends has that abort, and print a stack trace behind the last test's dot."""
    return [one.name for one in threading.enumerate() if one.name.startswith(SENDER)]


def folders() -> list[Path]:
    """Folders of a Ray session or of an engine's sockets that this process did not remove."""
    here = Path(tempfile.gettempdir())
    return [path for prefix in FOLDERS for path in here.glob(f"{prefix}{os.getpid()}-*")]


def started() -> Iterator[psutil.Process]:
    """Living processes that this session started, orphans included."""
    offspring = {child.pid for child in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        if process.pid in offspring or _carries_mark(process):
            yield process


def processes() -> list[str]:
    """'pid command' of each, but for the trackers that end with this process."""
    return [
        f"{process.pid} {command}"
        for process in started()
        if (command := _command(process)) and "multiprocessing.resource_tracker" not in command
    ]


def after(timeout_s: float, look: Callable[[], list[str]]) -> list[str]:
    """What `look` still finds by then: processes take time to end, and a thread whose collective
    was given up holds its image until that has seen so."""
    deadline_s = time.monotonic() + timeout_s
    while (left := look()) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    return left


def _carries_mark(process: psutil.Process) -> bool:
    try:
        return process.pid != os.getpid() and process.environ().get(MARK) == SESSION
    except psutil.Error:
        return False


def _command(process: psutil.Process) -> str:
    """The command line; empty for a process that has ended (a zombie included)."""
    try:
        return " ".join(process.cmdline())[:200]
    except psutil.Error:
        return ""
