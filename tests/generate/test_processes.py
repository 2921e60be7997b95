"""Two engines in processes of their own, one after the other: they sample the same to the bit,
and nothing of them is left, whether they end by themselves or their starter is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).with_name("lockstep_process.py")


@dataclass
class Run:
    """What an engine sampled, and what was left 15 s after its process ended."""

    batches: Any
    engine_processes: int
    shared_files: int
    left: list[str]


@pytest.fixture(scope="module")
def runs(sharp_policy: Path) -> dict[str, Run]:
    return {
        "ended": run(sharp_policy, 1, lambda process: process.communicate()),
        "killed": run(sharp_policy, 2, lambda process: process.send_signal(signal.SIGKILL)),
    }


def run(policy: Path, order_seed: int, end) -> Run:
    with started(policy, order_seed) as (process, report):
        batches = json.loads(report.readline())
        offspring = psutil.Process(process.pid).children(recursive=True)
        files = {f for p in (process.pid, *(c.pid for c in offspring)) for f in shared_files(p)}
        end(process)
        process.wait(60)
        _, alive = psutil.wait_procs(offspring, timeout=15)
        deadline_s = time.monotonic() + 5
        while any(map(os.path.exists, files)) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        left = [*map(str, alive), *filter(os.path.exists, files)]
    return Run(batches, len(offspring), len(files), left)


@contextmanager
def started(policy: Path, order_seed: int) -> Iterator[tuple[subprocess.Popen, Any]]:
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(policy), str(order_seed), str(writing)],
        stdin=subprocess.PIPE,
        pass_fds=[writing],
    )
    os.close(writing)
    with os.fdopen(reading) as report:
        try:
            yield process, report
        finally:
            process.kill()
            process.wait()


def shared_files(pid: int) -> set[str]:
    """Files in /dev/shm that a process has mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in maps if " /dev/shm/" in line}


def test_lockstep_gives_the_same_bits_whatever_the_order_of_arrival(runs):
    first, second = runs["ended"].batches, runs["killed"].batches
    for number in (0, 1):
        assert len(first[number]) == 12 and all(len(group) == 4 for group in first[number])
        assert first[number] == second[number], f"batch {number + 1}"
    assert first[0] != first[1]


@pytest.mark.parametrize("how", ["ended", "killed"])
def test_nothing_of_an_engine_outlives_the_process_that_started_it(runs, how):
    assert runs[how].engine_processes >= 2, "the engine core and its worker"
    assert runs[how].shared_files >= 1
    assert runs[how].left == []
