"""`--dry-run`: the resolved configuration, what follows from it, and what goes where."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from distrl.actors.cluster import Demand, check_local_gpus, demands
from distrl.actors.launch import generator_cores
from distrl.cli.checks import check_what_is_there
from distrl.cli.stages import check_context, check_functions
from distrl.config import Config, dump_yaml
from distrl.data.smollm2 import resolve_model

GIB = 2**30


def print_plan(config: Config, stages: Iterable[str] = ()) -> None:
    """Print everything, and what becomes of the `stages`, a line each; raises ConfigError,
    PlacementError, ModelError or DataError for what cannot work."""
    check_functions(config)
    check_context(config)
    check_what_is_there(config)
    console = Console()
    console.print(dump_yaml(config), highlight=False, markup=False)
    console.print(_limits(config))
    console.print(_placement(config))
    for line in stages:
        print(line)


def _limits(config: Config) -> Table:
    table = Table(title="What follows from it", show_header=False)
    driver = config.driver
    rows = {
        "samples of a step": f"{config.samples_per_step} = {driver.prompts_per_step} prompts x "
        f"{config.generate.samples_per_prompt}",
        "optimizer steps of a learner step": str(config.learn.epochs * config.learn.minibatches),
        "samples of the run": f"{driver.steps * config.samples_per_step:,}",
        "response tokens of a step, at most": (
            f"{config.samples_per_step * config.generate.max_new_tokens:,}"
        ),
        "slots (groups under way, at most)": (
            f"{driver.slots} = (lead {driver.steps_ahead} + 1) x {driver.prompts_per_step}"
            + (f" - window {driver.window}" if driver.window else "")
        ),
        "longest sequence": f"{config.sequence_tokens} tokens",
        "SFT examples are cut at": f"{config.sft_tokens} tokens",
        "the reward model's training texts are cut at": f"{config.reward_model_tokens} tokens",
        "weight transport": config.sync.transport,
        "checkpoints": f"every {driver.checkpoint_every} steps, the last "
        f"{driver.keep_checkpoints} kept",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _placement(config: Config) -> Table:
    wanted = demands(config)
    if config.cluster.address is None:
        check_local_gpus(wanted)
    table = Table(title=f"Placement: {config.cluster.address or 'a Ray cluster on this machine'}")
    for column in ("role", "workers", "CPUs each", "GPUs each", "cores", "memory each, about"):
        table.add_column(column)
    for demand in wanted:
        table.add_row(
            demand.role,
            str(demand.workers),
            f"{demand.cpus:g}",
            f"{demand.gpus:g}",
            _cores(config, demand),
            f"{_memory_bytes(config, demand.role) / GIB:.2f} GiB",
        )
    return table


def _cores(config: Config, demand: Demand) -> str:
    if demand.role != "generator":
        return "any"
    bound = [generator_cores(config, place) for place in range(demand.workers)]
    return ", ".join(core or "any" for core in bound)


PROCESS_BYTES = 0.6 * GIB
"""An interpreter with torch loaded."""


def _memory_bytes(config: Config, role: str) -> float:
    """Weights in float32, plus gradients and two Adam moments where there is an optimizer."""
    weights, learn = 4 * parameters(config), config.learn
    trained = 4.0 if learn.adam_bits == 32 else 2.5
    copies = 1.0 if learn.lora.rank else trained + (learn.ema is not None)
    copies += trained * (learn.has_critic and learn.value.trunk == "separate")
    copies += learn.kl.used and not learn.lora.rank  # the reference
    loading = weights if learn.ranks > 1 else 0  # a rank reads a model whole, and keeps its part
    needed = {
        "learner": weights * copies / learn.ranks + loading,
        "generator": 2 * weights + config.generate.kv_cache_gib * GIB,
        "scorer": weights,
    }
    return PROCESS_BYTES + needed[role]


def parameters(config: Config) -> int:
    """Parameters of the policy: counted in its checkpoint, or from the sizes of a new one."""
    folder = resolve_model(config.model.path)
    if folder is not None:
        from distrl.models.load import numbers_in

        return numbers_in(folder)
    model = config.model
    layer = 4 * model.hidden**2 + 3 * model.hidden * model.feed_forward + 2 * model.hidden
    return model.vocab * model.hidden + model.layers * layer + model.hidden
