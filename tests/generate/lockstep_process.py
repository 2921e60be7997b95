"""A process with an engine in lockstep: it reports two batches, then waits.

Usage: lockstep_process.py POLICY_FOLDER ORDER_SEED FILE_DESCRIPTOR. Writes one JSON line to
the descriptor (vLLM writes to standard output as it likes); ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch

from distrl.config import GenerateConfig, SyncConfig
from distrl.generate.engine import EngineSpec
from distrl.generate.generator import VLLMGenerator
from distrl.models import load_policy
from distrl.records import Prompt, Rollout
from distrl.sync.canary import publish_model
from distrl.sync.memory import SharedMemoryPublisher

GROUPS = 12


def prompt(index: int) -> Prompt:
    ids_P = np.random.default_rng(index).integers(3, 300, 3 + index % 7, dtype=np.int32)
    return Prompt(index=index, epoch=0, prompt_id=f"p{index}", text="", token_ids=ids_P)


def written(rollout: Rollout) -> list[tuple[list[int], str]]:
    """Tokens and the bits of the log-probabilities."""
    return [(s.token_ids.tolist(), s.logprobs.tobytes().hex()) for s in rollout.samples]


async def batch(generator: VLLMGenerator, first: int, order: random.Random) -> list:
    """GROUPS prompts from `first` on, arriving in a random order at random times."""
    await generator.hold(GROUPS)
    indices = list(range(first, first + GROUPS))
    order.shuffle(indices)
    waiting = {}
    for index in indices:
        waiting[index] = asyncio.create_task(generator.generate(prompt(index)))
        await asyncio.sleep(order.random() * 0.05)
    return [written((await waiting[index]).payload) for index in sorted(waiting)]


async def main(folder: Path, order: random.Random, report: int) -> None:
    torch.set_num_threads(1)
    config = GenerateConfig(max_new_tokens=24, kv_cache_gib=0.25, max_num_seqs=32)
    spec = EngineSpec(model=folder, config=config, max_model_len=64, seed=7)
    generator = VLLMGenerator("g0", spec, SyncConfig())
    await generator.start()
    publisher = SharedMemoryPublisher()
    model = load_policy(folder)
    batches = []
    for version in (1, 2):
        weights = publish_model(model, publisher, version=version, vocab=300, probe_tokens=24)
        await generator.load_weights(weights)
        batches.append(await batch(generator, version * GROUPS, order))
    with os.fdopen(report, "w") as file:
        print(json.dumps(batches), file=file)
    await asyncio.to_thread(sys.stdin.read)
    await generator.close()
    publisher.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), random.Random(int(sys.argv[2])), int(sys.argv[3])))
