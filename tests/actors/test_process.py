"""What an actor's process does to itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace

import psutil
import pytest

from distrl.actors.process import keep_to

ALL = sorted(os.sched_getaffinity(0))


@pytest.fixture
def thread() -> Iterator[int]:
    """The id of a thread beside the main one."""
    started, ended = threading.Event(), threading.Event()

    def body() -> None:
        started.set()
        ended.wait()

    one = threading.Thread(target=body)
    one.start()
    started.wait()
    yield one.native_id or 0
    ended.set()
    one.join()


@pytest.fixture
def child() -> Iterator[int]:
    """The id of a process below this one."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        with suppress(BrokenPipeError):  # a test may have ended it
            process.communicate(b"\n")


@pytest.fixture(autouse=True)
def unbound() -> Iterator[None]:
    yield
    for task in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has ended since
            os.sched_setaffinity(int(task), ALL)


def test_threads_and_children_keep_to_the_cores(thread: int, child: int) -> None:
    keep_to(ALL[-1:])
    assert [os.sched_getaffinity(who) for who in (0, thread, child)] == [{ALL[-1]}] * 3


def test_a_thread_that_is_bound_more_narrowly_stays_where_it_is(
    thread: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On eight cores that nobody needs to have."""
    cores = {os.getpid(): set(range(8)), thread: {2}}
    monkeypatch.setattr(os, "sched_getaffinity", lambda who: cores.get(who, set(range(8))))
    monkeypatch.setattr(os, "sched_setaffinity", lambda who, to: cores.update({who: set(to)}))
    keep_to((2, 3))
    assert (cores[os.getpid()], cores[thread]) == ({2, 3}, {2})
    keep_to((4, 5))
    assert cores[thread] == {4, 5}, "none of its own is left"


def test_who_ends_meanwhile_is_no_matter(
    thread: int, child: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = [psutil.Process(child)]
    monkeypatch.setattr(psutil.Process, "children", lambda *_, **__: children)
    children[0].kill()
    children[0].wait()
    threads = psutil.Process.threads
    gone = SimpleNamespace(id=2**22 + 1)  # above the largest id there is
    monkeypatch.setattr(psutil.Process, "threads", lambda of: [gone, *threads(of)])
    keep_to(ALL[-1:])
    assert os.sched_getaffinity(thread) == {ALL[-1]}


def test_without_cores_nothing_changes(thread: int) -> None:
    keep_to(None)
    assert os.sched_getaffinity(thread) == set(ALL)
