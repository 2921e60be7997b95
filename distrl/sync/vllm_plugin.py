"""What distrl adds to each of vLLM's processes, by vLLM's own entry points.

`register` (group `vllm.general_plugins`): the worker that loads the weights learns the `shm`
and `gloo` transports; `nccl` is vLLM's own. `end_with_starter` (group `vllm.platform_plugins`,
called as soon as vLLM is imported): an engine's process ends with the process that started it,
however that ends. A killed actor would leave it holding memory, and one that is killed while its
engine starts would leave it waiting for five minutes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
from pathlib import Path

BACKENDS = {"shm": "distrl_shm", "gloo": "distrl_gloo", "nccl": "nccl"}
"""vLLM's names of our transports."""

OURS = {
    "shm": ("distrl.sync.vllm_transfer", "SharedMemoryTransfer"),
    "gloo": ("distrl.sync.vllm_gloo", "GlooTransfer"),
}
"""Modules and classes of the transports that vLLM has to be told of."""

RELOADS = "vllm.model_executor.model_loader.reload.layerwise"
"""Who tells of layers that a load brought nothing for."""

ROTARY = re.compile(r"Rotary\w*: Failed to load weights")

DIE_WITH_PARENT = "DISTRL_ENGINE_DIES_WITH_PARENT"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def register() -> None:
    """Called by vLLM once or more in each process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for transport, where in OURS.items():
        if BACKENDS[transport] not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(BACKENDS[transport], *where)
    logging.getLogger(RELOADS).addFilter(_is_news)
    end_with_starter()


def _is_news(record: logging.LogRecord) -> bool:
    """Rotary embeddings have tables and no weights, which each load would warn of."""
    return not ROTARY.search(record.getMessage())


def end_with_starter() -> None:
    """Tie this process to the one that DIE_WITH_PARENT names; a platform we do not offer."""
    starter = int(os.environ.get(DIE_WITH_PARENT, os.getpid()))
    if starter == os.getppid():
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not Path("/proc", str(starter)).exists():  # gone before this process could be tied to it
        os._exit(1)
