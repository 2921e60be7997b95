"""The engine's half of the `gloo` transport: vLLM's NCCL back end with another group inside.

Tensors are not packed, because on this path nothing is gained by it: one arrives, and is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)

from distrl.records import TensorInfo
from distrl.sync.gloo import GlooGroup
from distrl.sync.vllm_transfer import begin_load

PATIENCE_S = 1800
"""The generator ends a sync long before that, and the engine with it."""


class GlooTransfer(NCCLWeightTransferEngine):
    """Takes checkpoint-format weights from the learner over TCP."""

    _group: GlooGroup | None = None

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Meet the learner and the engine's other workers."""
        assert init_info.master_address is not None and init_info.master_port is not None
        self._group = GlooGroup.join(
            init_info.master_address,
            init_info.master_port,
            rank=init_info.rank_offset + self.parallel_config.rank,
            world=init_info.world_size,
            timeout_s=PATIENCE_S,
        )

    def start_weight_update(self) -> None:
        begin_load(self.model, self.device)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Hand each tensor to the model's own loader as it comes."""
        if self._group is None:
            raise RuntimeError("these weights are sent by a learner that was not met before")
        incoming = self._incoming(self._group, update_info)
        cast(Any, self.model).load_weights(incoming)
        for _ in incoming:
            pass  # what a loader does not ask for is sent all the same

    def _incoming(
        self, group: GlooGroup, update: NCCLWeightTransferUpdateInfo
    ) -> Iterator[tuple[str, torch.Tensor]]:
        infos = (
            TensorInfo(name=name, dtype=dtype, shape=tuple(shape))
            for name, dtype, shape in zip(
                update.names, update.dtype_names, update.shapes, strict=True
            )
        )
        for name, tensor in group.receive(infos):
            yield name, tensor.to(self.device)

    def shutdown(self) -> None:
        self._group = None
