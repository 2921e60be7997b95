"""Memory that a pass frees is there for the next one, until it is given back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from distrl.learn.allocator import from_the_start

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")

START = """
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import torch
from distrl.learn.allocator import keep_freed_memory, return_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

def work(mib):
    graph = [torch.ones(mib * 2**18) for _ in range(160 // mib)]
    together.wait()
    return len(graph)

together = Barrier(1)
"""

KEEP = """
keep_freed_memory()
"""

BUSY = """
others = ThreadPoolExecutor(4)
apart = Barrier(4)

def ask(_):
    apart.wait()
    kept = [bytearray(3_000) for _ in range(100)]
    apart.wait()
    return kept

started = list(others.map(ask, range(4)))
"""

ALONE = """
for turn in range(12):
    before = faults()
    work({mib})
print(faults() - before)
"""

THREADS = """
together = Barrier(2)
with ThreadPoolExecutor(2) as threads:
    for turn in range(12):
        before = faults()
        list(threads.map(work, [{mib}] * 2))
print(faults() - before)
"""

RETURN = """
before = resident_mib()
work(40)
kept = resident_mib() - before
return_freed_memory()
print(round(kept), round(resident_mib() - before))
"""


SIZES = """
import ctypes

import torch

class Report(ctypes.Structure):  # mallinfo2(3)
    _fields_ = [(f"field{place}", ctypes.c_size_t) for place in range(10)]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Report

def in_use_mib():
    report = library.mallinfo2()
    return (report.field4 + report.field7) / 2**20  # mappings of their own, and the heap

torch.set_num_threads(1)
product = torch.ops.mkldnn._linear_pointwise
rows, weight = torch.ones(2000, 256), torch.ones(256, 256)
with torch.no_grad():
    product(rows, weight, None, "none", [], "")
    before = in_use_mib()
    for size in range(1, 1000):
        product(rows[:size], weight, None, "none", [], "")
print(round(in_use_mib() - before))
"""


def _printed(program: str, **environment: str) -> list[int]:
    answer = subprocess.run(
        [sys.executable, "-c", START + program],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    return [int(word) for word in answer.stdout.split()]


@pytest.mark.slow
@linux
@pytest.mark.parametrize("program", [ALONE, THREADS], ids=["alone", "threads"])
@pytest.mark.parametrize("mib", [4, 80])
def test_freed_blocks_are_used_again(program, mib):
    """As glibc comes, the kernel is asked for all 40,000 pages of a graph again. It takes some
    turns until small things that stay have found places between large ones."""
    assert _printed(KEEP + program.format(mib=mib))[0] < 4_000


@pytest.mark.slow
@linux
@pytest.mark.parametrize("mib", [4, 80])
def test_in_a_process_with_threads_of_its_own_they_are_from_the_start(mib):
    """A Ray actor's threads have arenas before it can ask for anything."""
    program = BUSY + KEEP + THREADS.format(mib=mib)
    assert _printed(program, **from_the_start())[0] < 4_000


@pytest.mark.slow
@linux
def test_what_a_stage_leaves_can_be_given_back():
    kept, left = _printed(KEEP + RETURN)
    assert kept > 150
    assert left < 20


@pytest.mark.slow
@linux
def test_products_of_many_sizes_leave_little_behind():
    """Of a thousand sizes torch's own limits would keep all kernels, 0.4 GiB or more."""
    assert _printed(SIZES, **from_the_start())[0] < 200
