"""What an engine is told about weights, in the words of vLLM's weight-transfer API."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from distrl.records import Offer, Weights
from distrl.sync import nccl


def in_memory(weights: Weights) -> dict[str, Any]:
    """Weights that the engine's workers find in shared memory (`vllm_transfer.py`)."""
    return {"path": weights.locator, "version": weights.version, "nbytes": weights.nbytes}


def meeting(offer: Offer) -> dict[str, Any]:
    """The group that the engine's workers are to make with the learner."""
    from vllm.distributed.weight_transfer.nccl_common import worker_init_payload
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo

    return worker_init_payload(
        NCCLWeightTransferInitInfo(
            master_address=offer.host,
            master_port=offer.port,
            rank_offset=1,
            world_size=offer.world,
            packed=True,
            packed_buffer_size_bytes=nccl.PACK_BYTES,
            packed_num_buffers=nccl.PACKS,
        )
    )


def arriving(offer: Offer) -> dict[str, Any]:
    """Weights that the learner sends over the group."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

    return asdict(
        NCCLWeightTransferUpdateInfo(
            names=[info.name for info in offer.tensors],
            dtype_names=[info.dtype for info in offer.tensors],
            shapes=[list(info.shape) for info in offer.tensors],
        )
    )
