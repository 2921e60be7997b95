"""What an actor's process does to itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from distrl.actors.process import keep_to

ALL = sorted(os.sched_getaffinity(0))
TWO = pytest.mark.skipif(len(ALL) < 2, reason="needs two cores")


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


@TWO
def test_a_thread_that_is_bound_more_narrowly_stays_where_it_is(thread: int) -> None:
    os.sched_setaffinity(thread, ALL[:1])
    keep_to(ALL[:2])
    assert os.sched_getaffinity(thread) == {ALL[0]}
    keep_to(ALL[1:2])
    assert os.sched_getaffinity(thread) == {ALL[1]}


def test_without_cores_nothing_changes(thread: int) -> None:
    keep_to(None)
    assert os.sched_getaffinity(thread) == set(ALL)
