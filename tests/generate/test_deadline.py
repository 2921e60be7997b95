"""A load's deadline begins with the call, whoever has the engine then."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from distrl.config import GenerateConfig, SyncConfig
from distrl.generate.engine import EngineSpec
from distrl.generate.generator import VLLMGenerator
from distrl.records import Weights
from distrl.roles import WorkerDied

LOADED = ("vllm.distributed.weight_transfer.base", "vllm.v1.engine.exceptions")
"""What an engine's start has imported before any load; it takes longer than the deadline here."""


@pytest.mark.slow
async def test_whoever_keeps_the_engine_paused_does_not_keep_a_load_waiting(
    tiny_policy: Path,
) -> None:
    for module in LOADED:
        importlib.import_module(module)
    spec = EngineSpec(model=tiny_policy, config=GenerateConfig(), max_model_len=64, seed=0)
    generator = VLLMGenerator("g0", spec, SyncConfig(timeout_s=0.1))
    weights = Weights(
        version=3,
        transport="shm",
        locator="/proc/1/fd/0",
        nbytes=1,
        probe_ids=np.zeros(2, dtype=np.int32),
        probe_logprobs=np.zeros(1, dtype=np.float32),
    )
    async with generator._updating:  # a lockstep batch that is never queued, say
        with pytest.raises(WorkerDied, match=r"version 3 was not loaded within sync.timeout_s=0.1"):
            await generator.load_weights(weights)
    with pytest.raises(WorkerDied, match="no engine is running"):
        await generator.load_weights(weights)
