"""The C library's allocator, set for passes over large tensors on a CPU.

As it comes, glibc gives large blocks back to the kernel as soon as they are free, and those of a
thread's own arena whenever a whole heap of 64 MiB is. The kernel must then find and clear each page
when it is asked for again: a fifth of a learner's time with 135 M parameters, and more on a virtual
machine whose host takes free pages back. Other C libraries are left as they are.

A Ray actor is too late for all of that: its threads have their arenas before its own code runs. So
an actor with passes to make starts with `from_the_start` in its environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""As malloc.h has them; mallopt(3)."""

TUNABLES = "GLIBC_TUNABLES"

KERNELS = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "256")
"""Kernels that oneDNN keeps, and torch beside it. Each is for a product of one size, and holds half
a MiB in small pieces between large ones. Where sequences are of any length, hardly two passes are
of one size: with 1,024 each, as they come, a compiled scorer of 4 M parameters grew by 600 MiB in
130 batches (by 1,100 in 1,000), and by 220 with these. A learner whose passes are much alike loses
nothing; with 128 it made 16 kernels anew in each step."""


def from_the_start() -> dict[str, str]:
    """Environment of a process that makes passes: one heap for all of its threads, in pages of
    2 MiB where the kernel gives them on request. With 135 M parameters on two cores, beside an
    engine, a step of the learner takes a fifth less of their time. An engine gains nothing: what it
    loads weights into is new each time, and has to be cleared page by page. And of the kernels made
    for the sizes of passes gone by, the last `KERNELS`.

    What the user has set stays, behind ours; `keep_freed_memory` has the last word on what it sets.
    """
    ours = ["glibc.malloc.arena_max=1", "glibc.malloc.hugetlb=1"]
    users = os.environ.get(TUNABLES)
    kernels = {name: os.environ.get(name, kept) for name, kept in KERNELS.items()}
    return {TUNABLES: ":".join([*ours, users] if users else ours), **kernels}


def keep_freed_memory() -> None:
    """Have this process keep what it frees, for the next pass: all of its threads share one heap,
    no block has a mapping of its own, and the heap's end is never cut off."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Give the kernel all pages that hold nothing, where other processes need them next."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
