"""An engine whose passes are compiled says the same of its samples, and takes new weights."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from vllm.config import CompilationMode

from distrl.config import SyncConfig
from distrl.generate.generator import VLLMGenerator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]


async def test_a_compiled_engine_keeps_up_with_its_weights(engine_spec, policies):
    config = engine_spec.config.model_copy(update={"compile": True})
    spec = dataclasses.replace(engine_spec, config=config)
    engine = VLLMGenerator("g0", spec, SyncConfig(timeout_s=60))
    try:
        await engine.start()
        assert engine._engine is not None
        done = engine._engine.vllm_config.compilation_config
        assert (done.mode, done.backend) == (CompilationMode.DYNAMO_TRACE_ONCE, "inductor")
        for version in (0, 1):
            if version:
                await engine.load_weights(policies.publish(version))
            rolling = (engine.generate(policies.prompt(i, tokens=3 + i)) for i in range(8))
            gap = max(policies.gap(parcel.payload) for parcel in await asyncio.gather(*rolling))
            print(f"version {version}: largest gap {gap:.2g} nats")
            assert gap < 1e-4
    finally:
        await engine.close()
