"""Memory that a pass frees is there for the next one."""

from __future__ import annotations

import subprocess
import sys

import pytest

ROUNDS = """
import resource
import torch
from distrl.learn.allocator import keep_freed_memory

keep_freed_memory()
for turn in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    graph = [torch.ones(2**20) for _ in range(40)]  # 4 MiB each, all freed together
    del graph
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_blocks_are_used_again():
    """Without the setting two processes in three ask the kernel for all 40,000 pages again."""
    for _ in range(3):
        words = [sys.executable, "-c", ROUNDS]
        answer = subprocess.run(words, check=True, capture_output=True, text=True)
        assert int(answer.stdout) < 2_000
