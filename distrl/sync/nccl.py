"""The learner's half of the `nccl` transport: vLLM's own packed broadcast, from the image.

The engine's half is vLLM's built-in back end. vLLM's trainer class is not used: it drives the
engine by calls without a deadline and reads a live model, where a learner here has long gone on.
"""

from __future__ import annotations

import socket
from typing import Any

import torch

from distrl.sync.image import Image
from distrl.sync.rendezvous import wait_for_all

PACK_BYTES = 256 * 2**20
"""Tensors are sent in packs of about this size. The learner's device holds four at most (two on
the way, and what they are made of), the engine's two."""

PACKS = 2
"""Packs under way at once."""


class NCCLGroup:
    """The learner is rank 0 of the group."""

    def __init__(self, communicator: Any) -> None:
        """communicator: vLLM's PyNcclCommunicator, on this process's CUDA device."""
        self._communicator = communicator

    @classmethod
    def meet(cls, listener: socket.socket, world: int, timeout_s: float) -> NCCLGroup:
        """Wait at `listener` for the engine's workers; it is closed with the group.

        As vLLM's `trainer_init` does, which cannot be given a deadline or a bound socket.
        Raises DistStoreError where one does not come in time. One that dies just after it came
        keeps this thread for good: NCCL has no deadline for that.
        """
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup
        from vllm.utils.nccl import unpinned_nccl_env

        store = wait_for_all(listener, world, timeout_s)
        group = StatelessProcessGroup(rank=0, world_size=world, store=store)
        device = torch.accelerator.current_device_index()
        with unpinned_nccl_env():
            communicator = PyNcclCommunicator(group, device=device)
        if communicator.disabled:  # it would send nothing, and say so to nobody
            raise RuntimeError("vLLM found no NCCL library in the learner's process")
        return cls(communicator)

    def send(self, image: Image) -> None:
        """Tensor by tensor onto the device and out, so the model is never on it twice."""
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        device = self._communicator.device
        with torch.accelerator.device_index(device.index):
            packed_nccl_broadcast_producer(
                iterator=image.tensors(device),
                group=self._communicator,
                src=0,
                post_iter_func=lambda pair: pair[1],
                buffer_size_bytes=PACK_BYTES,
                num_buffers=PACKS,
            )

    def destroy(self) -> None:
        """Abort: a kernel that waits for a dead peer ends, and who waits for it goes on."""
        self._communicator.destroy()
