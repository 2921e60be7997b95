"""Seconds of a weight sync over those of a copy, and how long the engine stands still.

    python benchmarks/weight_publish.py [--shapes tiny,smollm2] [--rounds 5]

A sync: the learner publishes (finite check and image in shared memory, the probe beside them), the
generator pauses its engine, takes the image on, resumes, and proves it by the canary.
The copy: all tensors into memory that is there already, one thread; into new memory it takes up to
five times as long, or not, as the allocator has it. "Write" is the image alone, by as many threads
as there are cores. In turns, the engine idle. Aim, set before the first run: at most twice the copy
for the publication; the engine's part is reported beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import middle, report

from distrl.config import GenerateConfig, ModelConfig, SyncConfig
from distrl.data.smollm2 import resolve_model
from distrl.data.tokenizer import train_tokenizer
from distrl.generate.engine import EngineSpec
from distrl.generate.generator import VLLMGenerator
from distrl.models.crew import Crew
from distrl.models.load import load_policy, new_llama, save_policy
from distrl.sync.canary import publish_model
from distrl.sync.memory import KEPT_VERSIONS, SharedMemoryPublisher

CORES = 2
WORDS = "the movie is a good film and the story was not as bad as it could have been"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default="tiny,smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory(prefix="distrl-benchmark-") as scratch:
            figures |= asyncio.run(_measure(shape, _folder(shape, Path(scratch)), options.rounds))
    report(
        "Weight sync",
        figures,
        f"python benchmarks/weight_publish.py --shapes {options.shapes} --rounds {options.rounds}",
    )


def _folder(shape: str, scratch: Path) -> Path:
    if shape == "smollm2":
        folder = resolve_model("smollm2")
        assert folder is not None
        return folder
    tokenizer = train_tokenizer([WORDS] * 8, 2048, 128)
    config = ModelConfig(hidden=256, heads=8, layers=4, vocab=2048, context=128)
    save_policy(new_llama(config, tokenizer, seed=0), tokenizer, scratch / "policy")
    return scratch / "policy"


async def _measure(shape: str, folder: Path, rounds: int) -> dict[str, Any]:
    model = load_policy(folder)
    spec = EngineSpec(
        model=folder,
        config=GenerateConfig(max_num_seqs=16, kv_cache_gib=0.25),
        max_model_len=128,
        seed=0,
        cores="0",
    )
    sync = SyncConfig()
    generator = VLLMGenerator("g0", spec, sync)
    await generator.start()
    crew = Crew.of_cores(CORES)
    publisher, another = SharedMemoryPublisher(CORES), SharedMemoryPublisher(CORES)
    nbytes = 0
    copies = [tensor.clone() for tensor in model.state_dict().values()]
    names = ("copy", "write", "publish", "transfer", "canary")
    times: dict[str, list[float]] = {name: [] for name in names}
    try:
        for version in range(1, rounds + 1 + KEPT_VERSIONS):
            began = time.perf_counter()
            for copy, tensor in zip(copies, model.state_dict().values(), strict=True):
                copy.copy_(tensor)
            copied = time.perf_counter()
            another.publish(model.state_dict(), version)
            written = time.perf_counter()
            weights = publish_model(
                model,
                publisher,
                version=version,
                vocab=256,
                probe_tokens=sync.canary_tokens,
                together=crew.together,
            )
            ready, nbytes = time.perf_counter(), weights.nbytes
            await generator._transfer(weights)
            held = time.perf_counter()
            gap = await generator._canary_gap(weights)
            proven = time.perf_counter()
            assert gap < 1e-3, gap
            if version > KEPT_VERSIONS:  # the first ones touch everything for the first time
                marks = (began, copied, written, ready, held, proven)
                for name, start, end in zip(names, marks, marks[1:], strict=False):
                    times[name].append(end - start)
    finally:
        publisher.close()
        another.close()
        crew.close()
        await generator.close()
    ratio = statistics.median(times["publish"]) / statistics.median(times["copy"])
    shown = {name: middle([1000 * s for s in values], 1) for name, values in times.items()}
    return {
        f"{shape}, MB": f"{nbytes / 1e6:.1f}",
        f"{shape}, copy, ms": shown["copy"],
        f"{shape}, write, ms": shown["write"],
        f"{shape}, publish, ms": shown["publish"],
        f"{shape}, publish over copy": f"{'ok  ' if ratio <= 2 else 'MISS'} {ratio:.2f}",
        f"{shape}, engine paused and loading, ms": shown["transfer"],
        f"{shape}, canary, ms": shown["canary"],
    }


if __name__ == "__main__":
    main()
