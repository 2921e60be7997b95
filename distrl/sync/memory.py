"""Weights in shared memory: all of the learner's half of the `shm` transport, and what the others
send from.

Each published version is one safetensors image in an anonymous memory file
(`memfd_create`), reached by other processes of the same machine and user as
`/proc/<learner pid>/fd/<n>`. It has no name in any file system, so it is gone with
the learner however that ends: there is never a file in /dev/shm to clean up.

A new version is written over the oldest, in memory that the writer has mapped: nothing is left to
do then but to copy numbers, where finding and mapping free pages takes eight times as long. Who
reads an image holds a lock on it (`hold`), and then it is let go of instead; and an image says
which version it is.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, flock
from typing import BinaryIO, Protocol

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from distrl.errors import UserError

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


class NonFiniteWeights(UserError, ValueError):
    """Weights hold a NaN or Inf; they are never published."""


class SharedMemoryPublisher:
    """Holds the newest versions of a set of weights for other processes to read."""

    def __init__(self, threads: int = 1) -> None:
        """threads: that copy tensors."""
        self._kept: deque[_Memory] = deque()
        self._writers = _Writers(threads)

    def publish(self, tensors: Mapping[str, Weight], version: int) -> tuple[str, int]:
        """Write `tensors` to shared memory.

        Returns the path that a reader opens, and the bytes of all tensors.
        Raises NonFiniteWeights (naming the tensor), or OSError when memory is short.
        Those that are spread over ranks, or a sum, are put together one at a time; the other ranks
        have to take part with a `Bystander`.
        """
        with self._writing() as memory:
            nbytes = write_safetensors(memory, tensors, version, self._writers)
        return memory.path, nbytes

    def relay(self, image: bytes | memoryview) -> str:
        """Hold the image of a version that was published on another machine.

        Returns the path that a reader on this machine opens. Raises OSError when memory is short.
        """
        with self._writing() as memory:
            memory.sized(len(image)).numpy()[:] = np.frombuffer(image, dtype=np.uint8)
        return memory.path

    @contextmanager
    def _writing(self) -> Iterator[_Memory]:
        """Memory that nobody reads; the newest version from then on, or gone where that failed."""
        memory = self._writable()
        try:
            yield memory
        except BaseException:
            memory.file.close()
            raise
        flock(memory.file, LOCK_UN)
        self._kept.append(memory)

    def _writable(self) -> _Memory:
        """The oldest version's, or new where there are not enough versions yet or somebody is
        reading that; locked."""
        if len(self._kept) >= KEPT_VERSIONS:
            oldest = self._kept.popleft()
            try:
                flock(oldest.file, LOCK_EX | LOCK_NB)
                return oldest
            except BlockingIOError:
                oldest.file.close()
        memory = _Memory()
        flock(memory.file, LOCK_EX)
        return memory

    def close(self) -> None:
        """Free all versions. May be called twice."""
        while self._kept:
            self._kept.popleft().file.close()
        self._writers.close()


class _Memory:
    """A memory file, and its bytes as this process sees them: mapped once, for all versions."""

    def __init__(self) -> None:
        self.file: BinaryIO = os.fdopen(os.memfd_create(NAME), "r+b", buffering=0)
        self._mapped: torch.Tensor | None = None

    def sized(self, size: int) -> torch.Tensor:
        """[size] uint8, all of the file, which has that size from now on.

        Raises OSError when memory is short: all of it is asked for here, as a mapped page that
        cannot be had would end the process.
        """
        if self._mapped is None or len(self._mapped) != size:
            number = self.file.fileno()
            os.ftruncate(number, size)
            os.posix_fallocate(number, 0, size)
            self._mapped = torch.from_file(self.path, shared=True, size=size, dtype=torch.uint8)
        return self._mapped

    @property
    def path(self) -> str:
        """Where other processes find it."""
        return f"/proc/{os.getpid()}/fd/{self.file.fileno()}"


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


def held(file: BinaryIO) -> str:
    """A path in this process of what `hold` holds, and of nothing else: the publisher's own, which
    it was opened by, may be a newer version's by now."""
    return f"/proc/self/fd/{file.fileno()}"


class Bystander:
    """What the other ranks of a learner publish with: it helps to gather, and keeps nothing."""

    def publish(self, tensors: Mapping[str, Weight], version: int) -> tuple[str, int]:
        """Raises NonFiniteWeights where `SharedMemoryPublisher` does."""
        for name, tensor in tensors.items():
            _check_finite(whole(tensor).detach(), name)
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

PART = 2**20
"""Elements of a tensor that one thread copies at a time: few enough to be in a cache still, from
looking whether they are finite."""

Part = tuple[torch.Tensor, torch.Tensor, str]
"""[n] bytes of an image, the numbers that go there, and the name of their tensor."""


class _Writers:
    """Threads that copy parts of tensors."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "publish", torch.set_num_threads, (1,))

    def write(self, parts: Sequence[Part]) -> None:
        """Nobody is at work any more when this ends. Raises NonFiniteWeights."""
        shares = [parts[place :: self._threads] for place in range(self._threads)]
        futures = [self._pool.submit(_write_share, share) for share in shares if share]
        wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        self._pool.shutdown()


def write_safetensors(
    memory: _Memory, tensors: Mapping[str, Weight], version: int, writers: _Writers
) -> int:
    """Make `memory` the image of `tensors`; returns their bytes.

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
    image = memory.sized(len(head) + end)
    image[: len(head)].numpy()[:] = np.frombuffer(head, dtype=np.uint8)
    _write_all(image[len(head) :], tensors, writers)
    return end


def _write_all(image: torch.Tensor, tensors: Mapping[str, Weight], writers: _Writers) -> None:
    """`image` is their bytes. Those that are there are copied together; one that has to be made for
    it is copied at once, and gone before the next."""
    parts: list[Part] = []
    at = 0
    for name, tensor in tensors.items():
        place = image[at:][: tensor.shape.numel() * tensor.dtype.itemsize]
        at += len(place)
        parts += _parts(tensor, place, name)
        if isinstance(tensor, DTensor) or not (
            isinstance(tensor, torch.Tensor) and tensor.is_contiguous()
        ):
            writers.write(parts)
            parts.clear()
    writers.write(parts)


def _parts(tensor: Weight, place: torch.Tensor, name: str) -> list[Part]:
    numbers = whole(tensor).detach().contiguous().view(-1).split(PART)
    places = place.split(PART * tensor.dtype.itemsize)
    return [(there, these, name) for there, these in zip(places, numbers, strict=True)]


def _write_share(parts: Sequence[Part]) -> None:
    for place, part, name in parts:
        _check_finite(part, name)
        if part.is_cuda:
            part = _landing(part.numel(), part.dtype).copy_(part)
        place.copy_(part.view(torch.uint8))


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


def _check_finite(numbers: torch.Tensor, name: str) -> None:
    """A finite sum says that all are; another one may be too large only."""
    if not (torch.isfinite(numbers.sum()) or torch.isfinite(numbers).all()):
        raise NonFiniteWeights(
            f"{name} holds a NaN or Inf; these weights are not published. See the model that they "
            "come from, or lower learn.lr and start anew from a whole one"
        )
