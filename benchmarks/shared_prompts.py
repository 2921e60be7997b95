"""Samples of one prompt in a CPU engine: the time with vLLM's own blocks over that with ours.

    python benchmarks/shared_prompts.py [--prompt 70] [--samples 8] [--groups 8] [--turns 5]

Keys and values are kept in blocks, of which only whole ones are shared. Two engines (4.3 M
parameters, 48 tokens a sample, compiled) have a core, one after the other: the blocks of 128 tokens
that vLLM takes on CPUs by itself, and `generate/engine.py`'s. Every turn has prompts of its own.
Reported; nothing was set beforehand.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import tempfile
import time
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

import numpy as np
from common import middle, report

from distrl.config import GenerateConfig, ModelConfig, SyncConfig
from distrl.data.tokenizer import train_tokenizer
from distrl.generate import engine
from distrl.generate.generator import VLLMGenerator
from distrl.models import new_llama, save_policy
from distrl.records import Prompt

THEIRS, VOCAB, RESPONSE = 128, 2048, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", type=int, default=70, help="tokens of a prompt")
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--groups", type=int, default=8, help="prompts of a turn")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="distrl-benchmark-") as folder, ExitStack() as engines:
        policy = _policy(Path(folder), options.prompt + RESPONSE)
        ends = {
            block: engines.enter_context(_started(block, policy, options))
            for block in (THEIRS, engine.BLOCK)
        }
        seconds: dict[int, list[float]] = {block: [] for block in ends}
        for turn in range(options.turns + 1):
            for block, end in ends.items():
                end.send(turn)
                seconds[block].append(end.recv())
    theirs, ours = (times[1:] for times in seconds.values())  # the first warms up
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    report(
        f"{options.samples} samples each of {options.groups} prompts of {options.prompt} tokens",
        {
            f"seconds, blocks of {THEIRS}": middle(theirs),
            f"seconds, blocks of {engine.BLOCK}": middle(ours),
            "the first over the second": middle(ratios),
        },
        f"python benchmarks/shared_prompts.py --prompt {options.prompt} --samples "
        f"{options.samples} --groups {options.groups} --turns {options.turns}",
    )


def _policy(folder: Path, context: int) -> Path:
    """Random weights: speed does not mind."""
    tokenizer = train_tokenizer(["benchmark"], 300, context)
    config = ModelConfig(hidden=256, heads=8, layers=4, vocab=VOCAB, context=context)
    model = new_llama(config, tokenizer, seed=0)
    model.resize_token_embeddings(VOCAB)
    save_policy(model, tokenizer, folder)
    return folder


def _started(block: int, policy: Path, options: argparse.Namespace) -> Connection:
    """The end of a pipe to a process with an engine that has such blocks; closed, it ends both.
    Raises EOFError where the engine does not start."""
    start = multiprocessing.get_context("spawn")
    here, there = start.Pipe()
    start.Process(target=_run, args=(there, block, policy, options)).start()
    there.close()  # so that the end of the other process is the end of the pipe
    here.recv()
    return here


def _run(end: Connection, block: int, policy: Path, options: argparse.Namespace) -> None:
    with patch.object(engine, "BLOCK", block):
        asyncio.run(_turns(end, policy, options))


async def _turns(end: Connection, policy: Path, options: argparse.Namespace) -> None:
    """Seconds of a turn for each one that is asked for."""
    config = GenerateConfig(
        samples_per_prompt=options.samples, max_new_tokens=RESPONSE, kv_cache_gib=0.5, compile=True
    )
    core = str(min(os.sched_getaffinity(0)))
    longest = options.prompt + RESPONSE
    spec = engine.EngineSpec(model=policy, config=config, max_model_len=longest, seed=0, cores=core)
    generator = VLLMGenerator("g0", spec, SyncConfig())
    await generator.start()
    end.send("ready")
    with suppress(EOFError):  # no more turns
        while True:
            end.send(await _turn(generator, await asyncio.to_thread(end.recv), options))
    await generator.close()


async def _turn(generator: VLLMGenerator, turn: int, options: argparse.Namespace) -> float:
    random = np.random.default_rng(turn)
    ids = random.integers(3, VOCAB, (options.groups, options.prompt), dtype=np.int32)
    prompts = [
        Prompt(index=place, epoch=0, prompt_id=f"{turn}-{place}", text="", token_ids=row)
        for place, row in enumerate(ids)
    ]
    began = time.perf_counter()
    await asyncio.gather(*map(generator.generate, prompts))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
