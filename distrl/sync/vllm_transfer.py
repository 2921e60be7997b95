"""Weights in shared memory: the engine's half, run by vLLM's workers.

vLLM drives a weight update as start, one or more chunks, finish. This class gives
that protocol a transport of ours: the one chunk names a safetensors image in shared
memory (see `distrl.sync.memory`), which is mapped, checked and loaded in place.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from distrl.sync.memory import held, hold


@dataclass
class NoInitInfo(WeightTransferInitInfo):
    """Shared memory needs no rendezvous."""


def begin_load(model: Any, device: torch.device) -> None:
    """Bring a model's layers back to the shape of a checkpoint.

    On a CPU, vLLM packs experts for their kernel only where it makes that kernel; later it would
    leave them as a checkpoint has them, and read them wrongly. So it makes the kernel anew.
    """
    initialize_layerwise_reload(model)
    for layer in model.modules() if device.type == "cpu" else ():
        method: Any = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """Where a version lies, and how many bytes it must hold."""

    path: str
    version: int
    nbytes: int


class SharedMemoryTransfer(WeightTransferEngine[NoInitInfo, SharedMemoryUpdate]):
    """Loads checkpoint-format weights from a shared-memory image into the model."""

    init_info_cls = NoInitInfo
    update_info_cls = SharedMemoryUpdate
    _held: BinaryIO | None = None

    def init_transfer_engine(self, init_info: NoInitInfo) -> None: ...

    def start_weight_update(self) -> None:
        """Bring the layers back to the shape of a checkpoint.

        After loading, an engine packs weights for its kernels and frees the originals.
        """
        begin_load(self.model, self.device)

    def finish_weight_update(self) -> None:
        """Pack the layers for the kernels again, now with the new weights."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self._held is not None:  # the loader may have kept tensors of the image until now
            self._held.close()

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Map the image and hand it to the model's own loader, tensor by tensor: on a GPU no more
        of it is there at once than the loader holds.

        Raises OSError where the image is not there any more, and ValueError where it is not as
        large as was announced.
        """
        self._held = hold(update_info.path, update_info.version)
        if (nbytes := _nbytes(self._held)) != update_info.nbytes:
            raise ValueError(f"{nbytes} bytes of weights where {update_info.nbytes} were sent")
        with safe_open(held(self._held), framework="pt", device=str(self.device)) as image:
            names = image.keys()
            cast(Any, self.model).load_weights((name, image.get_tensor(name)) for name in names)

    def shutdown(self) -> None: ...


def _nbytes(image: BinaryIO) -> int:
    """Bytes of all tensors of a safetensors file, read at its beginning."""
    header = int.from_bytes(image.read(8), "little")
    image.seek(0)
    return os.fstat(image.fileno()).st_size - 8 - header
