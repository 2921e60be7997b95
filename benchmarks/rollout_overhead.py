"""Tokens/s through driver and generator actor, over the bare engine's.

    python benchmarks/rollout_overhead.py [--shape tiny|smollm2] [--turns 5]

The bare engine is `LLM.generate` of vLLM, in a process of its own, on the same core, with
the same prompts, samples and concurrency. The two take turns, so that noise of the machine
hits both; only one of them works at a time. Scoring and learning answer at once.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from common import middle, report

from distrl.actors.cluster import connected
from distrl.actors.launch import launched
from distrl.config import Config
from distrl.data.smollm2 import smollm2_checkpoint
from distrl.data.tokenizer import load_tokenizer, train_tokenizer
from distrl.driver.driver import Driver
from distrl.metrics import ListSink
from distrl.models import new_llama, save_policy
from distrl.records import GroupInfo, Parcel, Prompt, ScoredInfo, StepReport, Weights

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": {"hidden": 256, "heads": 8, "layers": 4, "vocab": 2048, "context": 128},
        "generate": {"samples_per_prompt": 4, "max_new_tokens": 48, "max_num_seqs": 64},
        "driver": {"prompts_per_step": 64},
    },
    "smollm2": {
        "model": {"path": "smollm2"},
        "generate": {"samples_per_prompt": 4, "max_new_tokens": 32, "max_num_seqs": 64},
        "driver": {"prompts_per_step": 16},
    },
}


ALIKE: dict[str, Any] = {
    "learn": {"value": {"start": "policy"}},
    "score": {"parts": [{"name": "nothing", "function": "rollout_overhead:nothing"}]},
}


def nothing(*, prompt: str, response: str, meta: Mapping[str, Any]) -> float:
    """The reward of a scorer that has to be there and is never asked."""
    return 0.0


class InstantScorer:
    """Answers 0 for every sample, at once."""

    name = "instant"

    async def score(self, group: Parcel[GroupInfo]) -> Parcel[ScoredInfo]:
        rewards = (0.0,) * len(group.info.lengths)
        return Parcel(info=ScoredInfo(group=group.info, rewards=rewards, seconds=0.0), payload=None)

    async def restart(self) -> None: ...

    async def close(self) -> None: ...


class InstantLearner:
    """Publishes what a real learner holds, and learns nothing from it."""

    def __init__(self, learner: Any) -> None:
        self._learner, self._steps = learner, 0

    async def learn(self, payloads: Sequence[Any], *, oldest: int = 0) -> StepReport:
        self._steps += 1
        return StepReport(step=self._steps, version=0, skipped=True, metrics={})

    async def publish(self) -> Weights:
        return await self._learner.publish()

    async def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)

    async def load(self, folder: Path) -> None: ...

    async def export(self, folder: Path) -> None: ...

    async def close(self) -> None: ...


class Timed:
    """A generator that notes when its first group was asked for and its last one landed."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self.tokens, self.began, self.ended = 0, 0.0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    async def generate(self, prompt: Prompt) -> Parcel[GroupInfo]:
        self.began = self.began or time.monotonic()
        parcel = await self._generator.generate(prompt)
        self.ended = time.monotonic()
        self.tokens += sum(parcel.info.lengths)
        return parcel


class Source:
    """The benchmark's prompts, in order."""

    def __init__(self, rows: Sequence[list[int]]) -> None:
        self._rows, self.cursor = rows, 0

    def next(self) -> Prompt:
        row = self._rows[self.cursor % len(self._rows)]
        prompt = Prompt(
            index=self.cursor,
            epoch=0,
            prompt_id=str(self.cursor),
            text="",
            token_ids=np.asarray(row, dtype=np.int32),
        )
        self.cursor += 1
        return prompt

    def seek(self, cursor: int) -> None:
        self.cursor = cursor


class NoCheckpoints:
    """Takes checkpoints and forgets them."""

    def begin(self, step: int) -> Path:
        return Path(tempfile.mkdtemp(prefix="distrl-benchmark-"))

    def commit(self, step: int, state: Mapping[str, Any]) -> Path:
        return Path()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="distrl-benchmark-") as scratch:
        folder = Path(scratch)
        config = Config.model_validate(ALIKE | SHAPES[options.shape])
        policy = _policy(config, folder / "policy")
        rows = _prompts(config, policy)
        with connected(config):
            figures = asyncio.run(_measure(config, policy, rows, options.turns, folder))
    bare, ours = figures
    ratios = [b / a for a, b in zip(bare, ours, strict=True)]
    report(
        f"Rollouts through driver and actor, shape {options.shape}",
        {
            "bare engine, tokens/s": middle(bare, 0),
            "driver + actor, tokens/s": middle(ours, 0),
            "ratio, median of turns": f"{statistics.median(ratios):.3f}",
            "ratio, each turn": ", ".join(f"{r:.3f}" for r in ratios),
        },
        f"python benchmarks/rollout_overhead.py --shape {options.shape} --turns {options.turns}",
    )


async def _measure(
    config: Config, policy: Path, rows: list[list[int]], turns: int, folder: Path
) -> tuple[list[float], list[float]]:
    """Tokens/s of each turn, bare and ours; a warm-up turn of each is left out."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    bare_engine = context.Process(target=_bare, args=(theirs, policy, config, rows))
    bare_engine.start()
    bare, ours = [], []
    try:
        await asyncio.to_thread(mine.recv)
        async with launched(config, policy=policy, reward_model=None, logs=folder) as cast:
            for _ in range(turns + 1):
                mine.send("go")
                bare.append(await asyncio.to_thread(mine.recv))
                ours.append(await _through_driver(config, cast, rows))
    finally:
        mine.send("stop")
        bare_engine.join()
    return bare[1:], ours[1:]


async def _through_driver(config: Config, cast: Any, rows: list[list[int]]) -> float:
    generator: Any = Timed(cast.generators[0])
    await Driver(
        config.driver.model_copy(update={"steps": 1, "max_staleness": 1}),
        source=Source(rows),
        generators=[generator],
        scorers=[InstantScorer()],
        learner=InstantLearner(cast.learner),
        sink=ListSink(),
        checkpoints=NoCheckpoints(),
        samples_per_prompt=config.generate.samples_per_prompt,
    ).run()
    return generator.tokens / (generator.ended - generator.began)


def _bare(pipe: Connection, policy: Path, config: Config, rows: list[list[int]]) -> None:
    """`LLM.generate` on core 0, whenever told to go."""
    import os

    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= {"VLLM_CPU_CI_ENV": "1"}
    from vllm import LLM, SamplingParams

    generate = config.generate
    engine = LLM(
        model=str(policy),
        dtype=generate.dtype,
        max_model_len=config.sequence_tokens,
        max_num_seqs=generate.max_num_seqs,
        kv_cache_memory_bytes=int(generate.kv_cache_gib * 2**30),
        enforce_eager=True,
        generation_config="vllm",
    )
    params = SamplingParams(
        n=generate.samples_per_prompt,
        temperature=generate.temperature,
        max_tokens=generate.max_new_tokens,
        logprobs=0,
        detokenize=False,
    )
    prompts: list[Any] = [{"prompt_token_ids": row} for row in rows]
    pipe.send("ready")
    while pipe.recv() == "go":
        engine.reset_prefix_cache()
        began = time.monotonic()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.monotonic() - began
        pipe.send(sum(len(c.token_ids) for out in outputs for c in out.outputs) / seconds)
    engine.llm_engine.engine_core.shutdown()  # else this process waits for its engine for ever


def _policy(config: Config, folder: Path) -> Path:
    """The checkpoint of a shape: SmolLM2, or random weights (speed does not mind)."""
    if config.model.path:
        return smollm2_checkpoint()
    tokenizer = train_tokenizer(["benchmark"], 300, config.model.context)
    model = new_llama(config.model, tokenizer, seed=0)
    model.resize_token_embeddings(config.model.vocab)
    save_policy(model, tokenizer, folder)
    return folder


def _prompts(config: Config, policy: Path) -> list[list[int]]:
    ids = len(load_tokenizer(policy))
    rng = np.random.default_rng(0)
    shape = config.driver.prompts_per_step, config.data.max_prompt_tokens
    return rng.integers(3, ids, shape).tolist()


if __name__ == "__main__":
    main()
