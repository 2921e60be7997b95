"""Entry point `vllm.general_plugins`: what distrl adds to each of vLLM's processes.

vLLM calls `register` in every process that it starts: the worker that loads the
weights learns the `shm` transport, and the engine's processes learn to end with the
process that started them (a killed actor would leave them holding memory).
"""

from __future__ import annotations

import ctypes
import os
import signal

BACKEND = "distrl_shm"
DIE_WITH_PARENT = "DISTRL_ENGINE_DIES_WITH_PARENT"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def register() -> None:
    """Called by vLLM once or more in each process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "distrl.sync.vllm_transfer", "SharedMemoryTransfer"
        )
    if os.environ.get(DIE_WITH_PARENT) == str(os.getppid()):
        _die_with_parent()


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
