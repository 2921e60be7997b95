"""A policy whose choices are sharp enough to tell one version from another, and an engine that
starts from what a learner exports."""

from __future__ import annotations

import copy
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from distrl.config import GenerateConfig, LearnConfig, SyncConfig
from distrl.generate.engine import EngineSpec
from distrl.generate.generator import VLLMGenerator
from distrl.learn.learner import PolicyLearner
from distrl.learn.spec import LearnerSpec
from distrl.models import load_policy
from distrl.records import Prompt, Rollout, Sample, Weights
from distrl.sync.canary import probe_ids, probe_logprobs, publish_model
from distrl.sync.memory import SharedMemoryPublisher

CONTEXT = 288
"""Room for several blocks of the CPU engine's cache (32 tokens each)."""

TEMPERATURE = 0.7


@pytest.fixture(scope="session")
def sharp_policy(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_policy` with more positions and larger weights: far from a uniform distribution."""
    folder = tmp_path_factory.mktemp("sharp") / "policy"
    shutil.copytree(tiny_policy, folder)
    config = LlamaConfig.from_pretrained(folder, max_position_embeddings=CONTEXT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    shaken(model, seed=1, std=0.15).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Export:
    """The folder of a learner's policy, and its own log-probabilities of a probe."""

    policy: Path
    probe_ids: np.ndarray
    probe_logprobs: np.ndarray


@pytest.fixture(scope="module")
def exported(
    sharp_policy: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Export:
    """Of a learner whose weights have moved away from `sharp_policy`. A module's ADAPTERS are the
    rank of its adapters, which an export merges; none: every weight learns."""
    folder = tmp_path_factory.mktemp("exported")
    learn = {"value": {"start": "policy"}, "lora": {"rank": getattr(request.module, "ADAPTERS", 0)}}
    spec = LearnerSpec(
        policy=sharp_policy,
        reward_model=None,
        config=LearnConfig.model_validate(learn),
        total_steps=1,
        total_samples=1,
        longest=96,
        temperature=TEMPERATURE,
        seed=0,
        canary_tokens=200,
        scratch=folder,
        threads=1,
    )
    learner = PolicyLearner(spec)
    try:
        before = learner.publish().probe_logprobs
        trained: Any = learner.networks.trained[0]
        shaken(trained, seed=2)
        weights = learner.publish()
        learner.export(folder / "policy")
    finally:
        learner.close()
    assert np.abs(weights.probe_logprobs - before).max() > 0.1, "the weights have not moved"
    return Export(folder / "policy", weights.probe_ids, weights.probe_logprobs)


def shaken(model: PreTrainedModel, seed: int, std: float = 0.1) -> PreTrainedModel:
    """`model` with noise on every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * std)
    return model


class Policies:
    """The versions of a policy, published as a learner would; each is another variant of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.publisher = SharedMemoryPublisher()
        self.models: dict[int, PreTrainedModel] = {}
        self.exact: dict[int, PreTrainedModel] = {}

    def __getitem__(self, version: int) -> PreTrainedModel:
        if version not in self.models:
            model = load_policy(self.folder)
            self.models[version] = shaken(model, seed=100 + version) if version else model
        return self.models[version]

    def publish(self, version: int) -> Weights:
        return publish_model(
            self[version], self.publisher, version=version, vocab=300, probe_tokens=24
        )

    def publish_without_head(self, version: int) -> Weights:
        """As if the tied output head had been forgotten."""
        tensors = dict(self[version].state_dict())
        del tensors["lm_head.weight"]
        locator, nbytes = self.publisher.publish(tensors, version)
        probe = probe_ids(300, 24)
        return Weights(
            version=version,
            transport="shm",
            locator=locator,
            nbytes=nbytes,
            probe_ids=probe,
            probe_logprobs=probe_logprobs(self[version], probe),
        )

    def gap(self, rollout: Rollout) -> float:
        """Largest |log p(engine) - log p(transformers, the version that the token is of)|."""
        return max(self._gap(rollout.prompt, sample) for sample in rollout.samples)

    def _gap(self, prompt: Prompt, sample: Sample) -> float:
        gaps = np.empty(len(sample.token_ids))
        for span in sample.spans:
            expected = self._logprobs(span.version, prompt.token_ids, sample.token_ids)
            here = slice(span.start, span.end)
            gaps[here] = np.abs(sample.logprobs[here] - expected[here])
        return float(gaps.max())

    @torch.no_grad()
    def _logprobs(self, version: int, prompt_P: np.ndarray, tokens_T: np.ndarray) -> np.ndarray:
        """[T] log p(token | prompt and the tokens before), by one plain forward pass in float64:
        at some tokens one in float32 is as far off as the engine's."""
        if version not in self.exact:
            self.exact[version] = copy.deepcopy(self[version]).double()
        ids_L = torch.from_numpy(np.concatenate([prompt_P, tokens_T])).long()
        logits_TV = self.exact[version](input_ids=ids_L[None]).logits[0, len(prompt_P) - 1 : -1]
        logprobs_TV = torch.log_softmax(logits_TV / TEMPERATURE, -1)
        return logprobs_TV.gather(1, ids_L[len(prompt_P) :, None])[:, 0].numpy()

    @staticmethod
    def prompt(index: int, tokens: int = 5) -> Prompt:
        """A prompt of random tokens, the same for the same index."""
        ids_P = np.random.default_rng(index).integers(3, 300, tokens, dtype=np.int32)
        return Prompt(index=index, epoch=0, prompt_id=f"p{index}", text="", token_ids=ids_P)


@pytest.fixture(scope="module")
def policies(exported: Export) -> Iterator[Policies]:
    policies = Policies(exported.policy)
    yield policies
    policies.publisher.close()


@pytest.fixture(scope="module")
def engine_spec(exported: Export) -> EngineSpec:
    torch.set_num_threads(1)
    config = GenerateConfig(
        samples_per_prompt=4,
        max_new_tokens=96,
        temperature=TEMPERATURE,
        max_num_seqs=32,
        kv_cache_gib=0.25,
    )
    return EngineSpec(model=exported.policy, config=config, max_model_len=CONTEXT, seed=7)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(engine_spec: EngineSpec) -> AsyncIterator[VLLMGenerator]:
    """One engine, as slow to start as any: share it."""
    generator = VLLMGenerator("g0", engine_spec, SyncConfig(timeout_s=60))
    await generator.start()
    yield generator
    await generator.close()
    await generator.close()
