"""A gloo group of the learner and one engine: TCP between any two machines, no GPU needed.

vLLM has a helper for such groups. It silences the process's standard output while it waits for
the others, which two threads must not do at once, and to import it costs a learner ten seconds;
torch alone needs no more lines.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroupGloo

from distrl.records import TensorInfo
from distrl.sync.image import Image
from distrl.sync.rendezvous import go_to, wait_for_all

CPU = torch.device("cpu")


class GlooGroup:
    """The learner is rank 0, and what it broadcasts comes in the order that the offer lists."""

    def __init__(self, store: Store, host: str, rank: int, world: int, wait: timedelta) -> None:
        """host: this process's own address, at which the others reach it."""
        gloo: Any = ProcessGroupGloo  # its options are not in the type stubs
        options = gloo._Options()
        options._timeout = wait
        options._devices = [gloo.create_device(hostname=host)]
        self._group: Any = gloo(store, rank, world, options)

    @classmethod
    def meet(cls, listener: socket.socket, world: int, timeout_s: float) -> GlooGroup:
        """As the learner, wait at `listener` for the others; it is closed with the group.

        Raises DistStoreError where one does not come in time.
        """
        host = listener.getsockname()[0]
        store = wait_for_all(listener, world, timeout_s)
        return cls(store, host, 0, world, timedelta(seconds=timeout_s))

    @classmethod
    def join(cls, host: str, port: int, rank: int, world: int, timeout_s: float) -> GlooGroup:
        """As one of the engine's workers, go where the learner waits."""
        store, wait = go_to(host, port, world, timeout_s), timedelta(seconds=timeout_s)
        return cls(store, _address_towards(host, port), rank, world, wait)

    def send(self, image: Image) -> None:
        """Raises RuntimeError where a receiver is gone or takes longer than the deadline."""
        for _, tensor in image.tensors(CPU):
            self._broadcast(tensor.reshape(-1).view(torch.uint8))

    def receive(self, infos: Iterable[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor as it comes. All of them have to be taken."""
        for info in infos:
            dtype = getattr(torch, info.dtype)
            flat = torch.empty(math.prod(info.shape) * dtype.itemsize, dtype=torch.uint8)
            self._broadcast(flat)
            yield info.name, flat.view(dtype).view(info.shape)

    def _broadcast(self, bytes_N: torch.Tensor) -> None:
        self._group.broadcast(bytes_N, 0).wait()

    def destroy(self) -> None:
        """Whoever is in the middle of a broadcast is freed by gloo's own deadline."""


def _address_towards(host: str, port: int) -> str:
    """This machine's address on the way to `host`. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]
