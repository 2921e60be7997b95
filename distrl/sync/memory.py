"""Weights in shared memory: all of the learner's half of the `shm` transport, and what the others
send from.

Each published version is one safetensors image in an anonymous memory file
(`memfd_create`), reached by other processes of the same machine and user as
`/proc/<learner pid>/fd/<n>`. It has no name in any file system, so it is gone with
the learner however that ends: there is never a file in /dev/shm to clean up.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch.distributed.tensor import DTensor

from distrl.records import Weights

KEPT_VERSIONS = 2
"""A generator may still be reading the version before while the next is written."""


class NonFiniteWeights(ValueError):
    """Weights hold a NaN or Inf; they are never published."""


class SharedMemoryPublisher:
    """Holds the newest versions of a set of weights for other processes to read."""

    def __init__(self) -> None:
        self._open: deque[BinaryIO] = deque()

    def publish(self, tensors: Mapping[str, torch.Tensor], version: int) -> tuple[str, int]:
        """Write `tensors` to shared memory.

        Returns the path that a reader opens, and the bytes of all tensors.
        Raises NonFiniteWeights (naming the tensor), or OSError when memory is short.
        Tensors that are spread over ranks are gathered one at a time; the other ranks have to
        take part with a `Bystander`.
        """
        file = _memory_file(version)
        try:
            nbytes = write_safetensors(file, tensors)
        except BaseException:
            file.close()
            raise
        return self._hold(file), nbytes

    def relay(self, image: bytes | memoryview, version: int) -> str:
        """Hold the image of a version that was published on another machine.

        Returns the path that a reader on this machine opens.
        """
        file = _memory_file(version)
        _write_all(file, memoryview(image))
        return self._hold(file)

    def _hold(self, file: BinaryIO) -> str:
        self._open.append(file)
        while len(self._open) > KEPT_VERSIONS:
            self._open.popleft().close()
        return f"/proc/{os.getpid()}/fd/{file.fileno()}"

    def close(self) -> None:
        """Free all versions. May be called twice."""
        while self._open:
            self._open.popleft().close()


class Bystander:
    """What the other ranks of a learner publish with: it helps to gather, and keeps nothing."""

    def publish(self, tensors: Mapping[str, torch.Tensor], version: int) -> tuple[str, int]:
        """Raises NonFiniteWeights where `SharedMemoryPublisher` does."""
        for name, tensor in tensors.items():
            _finite(name, tensor)
        return "", 0

    def close(self) -> None: ...


DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
}


def write_safetensors(file: BinaryIO, tensors: Mapping[str, torch.Tensor]) -> int:
    """Write `tensors` in the safetensors format, one at a time; returns their bytes.

    The library's own writer either renames a temporary file into place, which an
    anonymous file cannot have, or builds the whole image in memory first.
    Layout: header length (8 bytes, little-endian), JSON header, raw data.
    Raises NonFiniteWeights, naming the tensor.
    """
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name, tensor in tensors.items():
        bytes_N = _finite(name, tensor).cpu().contiguous().view(-1).view(torch.uint8).numpy()
        _write_all(file, bytes_N.data)
    return offset


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be spread over ranks, every one of which has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    gathered = whole(tensor.detach())
    if not torch.isfinite(gathered).all():
        raise NonFiniteWeights(f"{name} holds a NaN or Inf; these weights are not published")
    return gathered


def still_held(weights: Weights) -> bool:
    """Whether a version's image is still where it was published: a descriptor that was closed may
    be that of a newer version by now."""
    try:
        held = os.readlink(weights.locator)
    except OSError:
        return False
    return held.split()[0] == f"/memfd:{_name(weights.version)}"


def _name(version: int) -> str:
    return f"distrl-weights-{version}"


def _memory_file(version: int) -> BinaryIO:
    return os.fdopen(os.memfd_create(_name(version)), "wb", buffering=0)


def _write_all(file: BinaryIO, data: memoryview) -> None:
    """One write moves at most 2 GiB."""
    while data:
        data = data[file.write(data) :]


def checkpoint_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face model's state under their checkpoint names.

    `named_parameters` lists a tied pair once, under the embedding's name; an engine
    that is sent the embedding alone keeps its old output head without a word. So the
    head is sent too, as a tensor of its own (safetensors refuses shared storage).
    """
    seen: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        place = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data_ptr()
        tensors[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return tensors
