"""A mixture of experts in a real engine: new weights reach its experts, over shared memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from distrl.config import GenerateConfig, LearnConfig, SyncConfig
from distrl.generate.engine import EngineSpec
from distrl.generate.generator import VLLMGenerator
from distrl.learn.learner import PolicyLearner
from distrl.learn.spec import LearnerSpec
from tests.generate.conftest import shaken

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


async def test_new_weights_reach_the_experts(tiny_policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "experts"
    shutil.copytree(tiny_policy, folder)
    config = OlmoeConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        dtype="float32",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shaken(OlmoeForCausalLM(config), seed=1, std=0.1).save_pretrained(folder)
    learner = PolicyLearner(
        LearnerSpec(
            policy=folder,
            reward_model=None,
            config=LearnConfig.model_validate({"value": {"start": "policy"}}),
            total_steps=1,
            total_samples=1,
            longest=96,
            temperature=1.0,
            seed=0,
            canary_tokens=64,
            scratch=tmp_path,
            threads=1,
        )
    )
    settings = GenerateConfig(max_new_tokens=40, max_num_seqs=8, kv_cache_gib=0.25)
    spec = EngineSpec(model=folder, config=settings, max_model_len=128, seed=7)
    generator = VLLMGenerator("g0", spec, SyncConfig(timeout_s=60))
    try:
        await generator.start()
        before = learner.publish()
        for version in (1, 2):
            shaken(learner.policy, seed=version, std=0.1)
            learner.version = version
            after = learner.publish()
            assert np.abs(after.probe_logprobs - before.probe_logprobs).max() > 0.1
            await generator.load_weights(after)
            found = await generator.score_tokens(after.probe_ids)
            assert np.abs(found - after.probe_logprobs).max() < 1e-4
    finally:
        await generator.close()
        learner.close()
