"""Starting a vLLM engine from this process, its weights replaceable in flight. No HTTP server runs;
vLLM's own processes listen to each other on the loopback address."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distrl.config import GenerateConfig
from distrl.sync.vllm_plugin import BACKENDS, DIE_WITH_PARENT

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """What an engine needs to know.

    Attributes:
        model: Hugging Face folder of the policy with its tokenizer.
        config: the `generate` section.
        max_model_len: tokens of prompt + response that must fit.
        seed: of the engine's own sampler (per-request seeds can kill the CPU engine).
        cores: CPU cores to bind to, as "0" or "0-3"; None lets vLLM choose.
    """

    model: Path
    config: GenerateConfig
    max_model_len: int
    seed: int
    cores: str | None = None

    @property
    def workers(self) -> int:
        """Processes that share the model (tensor parallel)."""
        return max(1, int(self.config.gpus))


def sampler_seed(seed: int, place: int, step: int = 0, restarts: int = 0) -> int:
    """The seed of an engine's sampler, below 2**32 as vLLM wants it: another one for each generator
    (`place`), and after each resume (`step`: taken before it) and restart, as a sampler that began
    anew would draw the same random numbers again."""
    key = (place, step, restarts)
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])


ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""On CPUs vLLM computes in a process beside the scheduler's, as threads must be bound to cores by
a process's environment. We bind the scheduler's own, with vLLM's own settings, and compute there:
the engine starts in half the time, and nothing waits for the other one at each token."""

KEEP_MEMORY = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "arena_max": 1,
        "mmap_max": 0,
        "trim_threshold": 2**62,
        "hugetlb": 1,
    }.items()
)
"""On CPUs an engine's processes keep the memory that they free, in large pages where the kernel has
them: a load of weights makes all tensors anew, and most of it was finding pages for them."""

KERNELS = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), "128")
"""Kernels that oneDNN keeps on a CPU, each for so many tokens as are read at once, and half a MiB.
With 1,024, as they come, an engine of 4 M parameters grew by 390 MiB in 200 batches, by 85 with
these."""

BLOCK = 32
"""Tokens of a block of keys and values on a CPU, the fewest that vLLM takes there instead of its
128: only whole blocks of a prompt are shared by its samples (`benchmarks/shared_prompts.py`)."""

SOCKETS = "distrl-vllm-"
"""Folders of engines' sockets are named so, and by the process that has the engine."""


def start_engine(spec: EngineSpec, sockets: Path, transport: str) -> AsyncLLM:
    """Start an engine and wait until it serves (half a minute, mostly imports).

    transport: how it will be given weights (`sync.transport`). sockets: a folder for vLLM's,
    which it never removes; the caller does.

    Must be called from a running event loop's thread that lives as long as the engine.
    Raises what vLLM raises when the engine cannot start.
    """
    os.environ.update(_environment(spec) | {"VLLM_RPC_BASE_PATH": str(sockets)})
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.ompmultiprocessing import OMPProcessManager
    from vllm.v1.engine.async_llm import AsyncLLM

    on_gpu = spec.config.gpus > 0
    args = AsyncEngineArgs(
        model=str(spec.model),
        dtype=spec.config.dtype,
        seed=spec.seed,
        max_model_len=spec.max_model_len,
        max_num_seqs=spec.config.max_num_seqs,
        tensor_parallel_size=spec.workers,
        distributed_executor_backend=_executor(spec),
        gpu_memory_utilization=spec.config.gpu_memory,
        block_size=None if on_gpu else BLOCK,
        kv_cache_memory_bytes=None if on_gpu else int(spec.config.kv_cache_gib * 2**30),
        enforce_eager=not (on_gpu or spec.config.compile),
        enable_prefix_caching=True,
        async_scheduling=False,
        scheduling_policy="priority",
        disable_log_stats=True,
        generation_config="vllm",  # its ends are taken all the same (models.sample.end_ids)
        logprobs_mode="processed_logprobs",
        weight_transfer_config=WeightTransferConfig(backend=BACKENDS[transport]),
        trust_remote_code=False,
    )
    config = args.create_engine_config()
    with OMPProcessManager(config).configure_omp_envs(0, 0):  # without effect on a GPU
        return AsyncLLM.from_vllm_config(config, disable_log_stats=True)


def _executor(spec: EngineSpec) -> str | None:
    """Who runs the model. Left to itself with several GPUs, vLLM sees the actor's placement group
    and takes Ray, which wants a bundle for each GPU where the actor has one for all."""
    if spec.config.gpus <= 0:
        return ONE_PROCESS
    return "mp" if spec.workers > 1 else None


def on_output(engine: AsyncLLM, heard: Callable[[], None]) -> None:
    """Have `heard` called with each pass that gives something out: our requests ask for their final
    outputs alone, and so see nothing of it. To be called before the event loop turns."""
    core = engine.engine_core
    get = core.get_output_async

    async def get_and_tell() -> Any:
        outputs = await get()
        heard()
        return outputs

    core.get_output_async = get_and_tell


def _environment(spec: EngineSpec) -> dict[str, str]:
    """Settings that vLLM reads from the environment of the process that starts it."""
    env = {
        DIE_WITH_PARENT: str(os.getpid()),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        # "1" skips a warm-up that small engines do not need, and has nothing compiled.
        "VLLM_CPU_CI_ENV": "0" if spec.config.compile else "1",
    }
    if spec.cores is not None:
        env["VLLM_CPU_OMP_THREADS_BIND"] = spec.cores
    if not spec.config.gpus:
        ours = {"GLIBC_TUNABLES": KEEP_MEMORY, **KERNELS}
        env |= {name: os.environ.get(name, value) for name, value in ours.items()}
    return env
