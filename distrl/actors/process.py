"""What every actor's process does: its own log file, and what the end of it says."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

import psutil
import ray

from distrl.generate.engine import SOCKETS

END_TIMEOUT_S = 5
"""A process that was told to end, or was killed, is gone by then."""

TRACKER = "multiprocessing.resource_tracker"


def log_to(path: Path) -> None:
    """Send this process's output, and that of its children, to `path` (appended)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def keep_to(cores: Collection[int] | None) -> None:
    """Have this process and those below it run on these CPU cores alone; a thread that is bound
    to some of them already stays there. None: any core will do."""
    if cores is None:
        return
    for thread in _threads():
        with contextlib.suppress(ProcessLookupError):
            bound = os.sched_getaffinity(thread) & set(cores)
            os.sched_setaffinity(thread, bound or cores)


def _threads() -> list[int]:
    """Ids of the threads of this process and of those below it; some may have ended since."""
    found = []
    for process in (me := psutil.Process(), *me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [thread.id for thread in process.threads()]
    return found


def tail(path: Path, lines: int = 12) -> str:
    """The last lines of a log, for an error message."""
    if not path.exists():
        return f"(no log at {path})"
    text = path.read_text(errors="replace").splitlines()
    return "\n".join([f"last lines of {path}:", *text[-lines:]])


def left_when_killed() -> list[Path]:
    """What an engine of this process could not remove if it were killed: the files in shared
    memory that processes below this one map (its message queues), and its sockets' folder."""
    found: set[str] = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            found |= set(re.findall(r"(/dev/shm/psm_\w+)$", maps, re.MULTILINE))
    sockets = Path(tempfile.gettempdir()).glob(f"{SOCKETS}{os.getpid()}-*")
    return [*(Path(path) for path in sorted(found)), *sockets]


def end_group(leader: psutil.Process) -> None:
    """See the leader of a process group on this machine to its end, and kill all the others.
    It blocks for up to twice END_TIMEOUT_S.

    The leader has been told to end, and is killed only where it does not: of a worker that goes
    without taking leave Ray says that it crashed. An engine ends with its actor by itself, but not
    in its first seconds: it knows nothing of us until it has imported vLLM. Python's resource
    tracker is spared, as it frees the others' shared memory, and then ends.
    """
    with contextlib.suppress(psutil.Error):
        try:
            leader.wait(END_TIMEOUT_S)
        except psutil.TimeoutExpired:
            leader.kill()
            leader.wait(END_TIMEOUT_S)  # from now on it starts no more of them
    if psutil.pid_exists(leader.pid):
        return  # somebody else's by now, or stuck in the kernel
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == leader.pid and TRACKER not in " ".join(process.cmdline()):
                process.kill()


def end_tree(process: psutil.Process) -> None:
    """Kill a process of this machine and all below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [process, *process.children(recursive=True)]
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(family, END_TIMEOUT_S)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is still there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def node_id() -> str:
    """The Ray node that this process runs on."""
    return ray.get_runtime_context().get_node_id()
