"""Weights in shared memory: all of the learner's half of the `shm` transport, and what the others
send from.

Each published version is one safetensors image in an anonymous memory file
(`memfd_create`), reached by other processes of the same machine and user as
`/proc/<learner pid>/fd/<n>`. It has no name in any file system, so it is gone with
the learner however that ends: there is never a file in /dev/shm to clean up.

A new version is written over the oldest, as most of a write is finding free pages of memory. Who
reads an image holds a lock on it (`hold`), and then it is let go of instead; and an image says
which version it is.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, flock
from functools import partial
from itertools import accumulate
from typing import BinaryIO, Protocol

import torch
from torch.distributed.tensor import DTensor

KEPT_VERSIONS = 2
"""A generator may still be reading the version before while the next is written."""

NAME = "distrl-weights"
"""What the kernel shows of a memory file (`/memfd:distrl-weights`)."""


class Parted(Protocol):
    """A weight that is put together when it is asked for: a sum, or one that is spread over ranks
    (torch's DTensor is both this and a tensor)."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> torch.Size: ...

    def full_tensor(self) -> torch.Tensor: ...


Weight = torch.Tensor | Parted


class NonFiniteWeights(ValueError):
    """Weights hold a NaN or Inf; they are never published."""


class SharedMemoryPublisher:
    """Holds the newest versions of a set of weights for other processes to read."""

    def __init__(self, threads: int = 1) -> None:
        """threads: that write large tensors."""
        self._open: deque[BinaryIO] = deque()
        self._writers = ThreadPoolExecutor(threads, "publish")

    def publish(self, tensors: Mapping[str, Weight], version: int) -> tuple[str, int]:
        """Write `tensors` to shared memory.

        Returns the path that a reader opens, and the bytes of all tensors.
        Raises NonFiniteWeights (naming the tensor), or OSError when memory is short.
        Those that are spread over ranks, or a sum, are put together one at a time; the other ranks
        have to take part with a `Bystander`.
        """
        with self._writing() as file:
            nbytes = write_safetensors(file, tensors, version, self._writers)
        return _path(file), nbytes

    def relay(self, image: bytes | memoryview) -> str:
        """Hold the image of a version that was published on another machine.

        Returns the path that a reader on this machine opens.
        """
        with self._writing() as file:
            _write(file, memoryview(image), at=0)
            os.ftruncate(file.fileno(), len(image))
        return _path(file)

    @contextmanager
    def _writing(self) -> Iterator[BinaryIO]:
        """A file that nobody reads; the newest version from then on, or gone where that failed."""
        file = self._writable()
        try:
            yield file
        except BaseException:
            file.close()
            raise
        flock(file, LOCK_UN)
        self._open.append(file)

    def _writable(self) -> BinaryIO:
        """The oldest version's file, or a new one where there are not enough versions yet or
        somebody is reading that; locked."""
        if len(self._open) >= KEPT_VERSIONS:
            file = self._open.popleft()
            try:
                flock(file, LOCK_EX | LOCK_NB)
                return file
            except BlockingIOError:
                file.close()
        file = os.fdopen(os.memfd_create(NAME), "r+b", buffering=0)
        flock(file, LOCK_EX)
        return file

    def close(self) -> None:
        """Free all versions. May be called twice."""
        while self._open:
            self._open.popleft().close()
        self._writers.shutdown()


def hold(path: str, version: int) -> BinaryIO:
    """A published image, open and as it is until this is closed.

    Raises OSError where it is not there any more: the same path may be a newer version's by now,
    or anything's.
    """
    if not os.readlink(path).startswith(f"/memfd:{NAME}"):
        raise FileNotFoundError(f"{path} is no image by now")
    file = open(path, "rb", buffering=0)  # noqa: SIM115
    try:
        try:
            flock(file, LOCK_SH | LOCK_NB)
        except BlockingIOError:
            raise FileNotFoundError(f"{path} is being written over") from None
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        if header[METADATA]["version"] != str(version):
            raise FileNotFoundError(f"{path} holds version {header[METADATA]['version']} by now")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


class Bystander:
    """What the other ranks of a learner publish with: it helps to gather, and keeps nothing."""

    def publish(self, tensors: Mapping[str, Weight], version: int) -> tuple[str, int]:
        """Raises NonFiniteWeights where `SharedMemoryPublisher` does."""
        for name, tensor in tensors.items():
            _gathered(name, tensor)
        return "", 0

    def close(self) -> None: ...


DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
}


METADATA = "__metadata__"
"""What safetensors calls a header's entry for texts of one's own."""

PART = 2**22
"""Elements of a tensor that one thread writes at a time."""


def write_safetensors(
    file: BinaryIO, tensors: Mapping[str, Weight], version: int, writers: ThreadPoolExecutor
) -> int:
    """Make `file` the image of `tensors`, written one at a time; returns their bytes.

    The library's own writer either renames a temporary file into place, which an
    anonymous file cannot have, or builds the whole image in memory first; and it refuses a tied
    pair. Here both names get their bytes: an engine that is sent the embedding alone keeps its old
    output head without a word.
    Layout: header length (8 bytes, little-endian), JSON header, raw data.
    Raises NonFiniteWeights, naming the tensor.
    """
    header: dict[str, object] = {METADATA: {"version": str(version)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.shape.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    head = len(encoded).to_bytes(8, "little") + encoded
    _write(file, memoryview(head), at=0)
    at = len(head)
    for name, tensor in tensors.items():
        at = _write_tensor(file, _gathered(name, tensor), at, writers)
    os.ftruncate(file.fileno(), at)
    return end


def _write_tensor(
    file: BinaryIO, tensor: torch.Tensor, at: int, writers: ThreadPoolExecutor
) -> int:
    """Its numbers from byte `at` on; returns where they end."""
    parts = tensor.contiguous().view(-1).split(PART)
    *places, end = accumulate((part.nbytes for part in parts), initial=at)
    each = writers.map if len(parts) > 1 else map  # a small one is written by who asks
    list(each(partial(_write_part, file), parts, places))
    return end


def _write_part(file: BinaryIO, part: torch.Tensor, at: int) -> None:
    if part.is_cuda:
        part = _landing(part.numel(), part.dtype).copy_(part)
    _write(file, part.view(torch.uint8).numpy().data, at)


_own = threading.local()


def _landing(count: int, dtype: torch.dtype) -> torch.Tensor:
    """[count] in this thread's page-locked memory, the same each time: a GPU copies there with no
    stop on the way."""
    if getattr(_own, "memory", None) is None:
        _own.memory = torch.empty(PART * 8, dtype=torch.uint8, pin_memory=True)
    return _own.memory[: count * dtype.itemsize].view(dtype)


def whole(tensor: Weight) -> torch.Tensor:
    """All of a weight; where it is spread over ranks, every one of them has to ask."""
    if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor()


def _gathered(name: str, tensor: Weight) -> torch.Tensor:
    """All of it, every number finite. A finite sum says so; another one may be too large only."""
    gathered = whole(tensor).detach()
    if not (torch.isfinite(gathered.sum()) or torch.isfinite(gathered).all()):
        raise NonFiniteWeights(
            f"{name} holds a NaN or Inf; these weights are not published. See the model that they "
            "come from, or lower learn.lr and start anew from a whole one"
        )
    return gathered


def _path(file: BinaryIO) -> str:
    """Where other processes find a file of this one."""
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def _write(file: BinaryIO, data: memoryview, at: int) -> None:
    """All of `data` from byte `at` on; one write moves at most 2 GiB."""
    while data:
        written = os.pwrite(file.fileno(), data, at)
        data, at = data[written:], at + written
