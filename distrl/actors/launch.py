"""All the actors of a training run, made together and ended together."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distrl.actors.cluster import Demand, demands, place, release
from distrl.actors.handles import (
    ASIDE,
    ActorHandle,
    GeneratorHandle,
    LearnerHandle,
    ScorerHandle,
)
from distrl.actors.workers import Cores, GeneratorActor, LearnerActor, ScorerActor, remote
from distrl.config import Config
from distrl.generate.engine import EngineSpec, sampler_seed
from distrl.learn.allocator import from_the_start
from distrl.learn.spec import LearnerSpec, Place

MAX_CALLS = 10_000
"""Calls an async actor runs at once; the driver's slots are the real bound."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cast:
    """The roles of a run."""

    generators: list[GeneratorHandle]
    scorers: list[ScorerHandle]
    learner: LearnerHandle


@asynccontextmanager
async def launched(
    config: Config,
    *,
    policy: Path,
    reward_model: Path | None,
    logs: Path,
    recording: Path | None = None,
    pretrain: Path | None = None,
    step: int = 0,
) -> AsyncIterator[Cast]:
    """Place and start every actor; all of them are ended when the block is left.

    policy: Hugging Face folder the policy starts from; reward_model: the critic's start,
    which may be None only where learn.value.start is "policy"; recording: where the learner
    records its steps, if at all; pretrain: the examples of PPO-ptx, if it is asked for; step:
    learner steps taken before, by the run that is resumed.
    Raises PlacementError before any actor starts, WorkerDied where one does not come up.
    """
    wanted = demands(config)
    groups = place(wanted, config.cluster.placement_timeout_s)
    by_role = {demand.role: demand for demand in wanted}
    make = _Maker(by_role, groups, config, policy.resolve(), logs.resolve(), step)
    recording = recording.resolve() if recording else None
    learner = make.learner(
        learner_spec(config, make.policy, reward_model, make.logs, recording, pretrain)
    )
    cast = Cast(
        generators=[make.generator(i, learner) for i in range(config.generate.workers)],
        scorers=[make.scorer(i) for i in range(config.score.workers)],
        learner=learner,
    )
    everyone = [cast.learner, *cast.scorers, *cast.generators]
    try:
        async with asyncio.TaskGroup() as starting:
            for handle in everyone:
                starting.create_task(handle.start())
        yield cast
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    finally:
        await asyncio.gather(*(handle.close() for handle in everyone))
        release(groups)


class _Maker:
    """Knows how each actor is made; a handle calls it again to make a replacement."""

    def __init__(
        self,
        wanted: dict[str, Demand],
        groups: dict[str, PlacementGroup],
        config: Config,
        policy: Path,
        logs: Path,
        step: int,
    ) -> None:
        self.wanted, self.groups, self.config = wanted, groups, config
        self.policy, self.logs, self.step = policy, logs, step
        self.mine, self.others = split_cores(config)

    def generator(self, place: int, learner: LearnerHandle) -> GeneratorHandle:
        config = self.config
        name = f"generator-{place}"
        spec = EngineSpec(
            model=self.policy,
            config=config.generate,
            max_model_len=config.engine_tokens,
            seed=sampler_seed(config.run.seed, place, self.step),
            cores=generator_cores(config, place),
        )
        actor = self._actor("generator", place, GeneratorActor, max_concurrency=MAX_CALLS)
        restarts = itertools.count()

        def begun() -> Any:
            seed = sampler_seed(config.run.seed, place, self.step, next(restarts))
            mine = replace(spec, seed=seed)
            return actor.remote(name, mine, config.sync, self._log(name), self.others)

        handle = GeneratorHandle(name, begun, self._log(name), config.generate.start_timeout_s)
        handle.learner = learner
        handle.engine_workers = spec.workers
        handle.sync_timeout_s = config.sync.timeout_s
        return handle

    def scorer(self, place: int) -> ScorerHandle:
        config = self.config
        name = f"scorer-{place}"
        threads = None if config.score.gpus else max(1, int(config.score.cpus))
        actor = self._actor(
            "scorer", place, ScorerActor, max_concurrency=MAX_CALLS, runtime_env=_passes()
        )
        return ScorerHandle(
            name,
            lambda: actor.remote(
                name, config.score, self.policy, threads, self._log(name), self.others
            ),
            self._log(name),
            config.generate.start_timeout_s,
        )

    def learner(self, spec: LearnerSpec) -> LearnerHandle:
        learn = self.config.learn
        place = Place(world=learn.ranks, timeout_s=learn.rank_timeout_s) if learn.spread else None
        others = [
            ActorHandle(*self._rank(spec, rank, f"learner-{rank}"))
            for rank in range(1, learn.ranks)
        ]
        handle = LearnerHandle(*self._rank(spec, 0, "learner"), others=others, place=place)
        handle.sync_timeout_s = self.config.sync.timeout_s
        return handle

    def _rank(
        self, spec: LearnerSpec, rank: int, name: str
    ) -> tuple[str, Callable[[], Any], Path, float]:
        """What a handle needs to know of one of the learner's ranks."""
        elsewhere = self.config.sync.transport != "shm" or self.config.cluster.address is not None
        sends = rank == 0 and elsewhere  # on one machine, an engine reads what lies there
        groups = {ASIDE: 2 * self.config.generate.workers} if sends else None
        actor = self._actor("learner", rank, LearnerActor, groups, runtime_env=_passes())
        width = max(1, int(self.config.learn.cpus))
        cores = self.mine and self.mine[rank * width : (rank + 1) * width]
        return (
            name,
            lambda: actor.remote(spec, self._log(name), cores),
            self._log(name),
            self.config.generate.start_timeout_s,
        )

    def _actor(
        self,
        role: str,
        place: int,
        cls: type,
        groups: Mapping[str, int] | None = None,
        **options: Any,
    ) -> Any:
        """groups: calls that run beside the others, by name of the group: how many at once."""
        demand = self.wanted[role]
        return remote(cls, groups).options(
            num_cpus=demand.bundle.get("CPU", 0),
            num_gpus=demand.bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=self.groups[role], placement_group_bundle_index=place
            ),
            **options,
        )

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"


def learner_spec(
    config: Config,
    policy: Path,
    reward_model: Path | None,
    scratch: Path,
    recording: Path | None = None,
    pretrain: Path | None = None,
) -> LearnerSpec:
    """What the learner of a run needs to know; `launched` says what the files are."""
    from_rewards = config.learn.value.start == "reward_model"
    return LearnerSpec(
        policy=policy,
        reward_model=reward_model.resolve() if reward_model and from_rewards else None,
        config=config.learn,
        total_steps=config.driver.steps,
        total_samples=config.driver.steps * config.samples_per_step,
        longest=config.generate.max_new_tokens,
        temperature=config.generate.temperature,
        seed=config.run.seed,
        canary_tokens=config.sync.canary_tokens,
        scratch=scratch,
        recording=recording,
        pretrain=pretrain if config.learn.pretrain.coef else None,
        transport=config.sync.transport,
        threads=None if config.learn.gpus else max(1, int(config.learn.cpus)),
    )


def _passes() -> dict[str, Any]:
    """The runtime_env, as Ray calls it, of an actor that makes passes."""
    return {"env_vars": from_the_start()}


def split_cores(config: Config) -> tuple[Cores, Cores]:
    """The learner's cores, and everybody else's: on a machine of its own making where there are
    enough for both, the last ones are the learner's alone. A step that shares its core with a
    scorer and the engines' helpers takes a fifth longer."""
    if config.learn.gpus or config.cluster.address is not None:
        return None, None
    there = sorted(os.sched_getaffinity(0))
    learner = max(1, int(config.learn.cpus)) * config.learn.ranks
    engines = config.generate.workers * max(1, int(config.generate.cpus))
    if config.generate.gpus or learner + engines > len(there):
        return None, None
    return tuple(there[-learner:]), tuple(there[:-learner])


def generator_cores(config: Config, place: int) -> str | None:
    """The CPU cores that generator `place` binds to, on a machine of its own making.

    Generators take cores from the first one on, so the learner has the last ones. On a
    cluster and on GPUs vLLM chooses.
    """
    if config.generate.gpus or config.cluster.address is not None:
        return None
    width = max(1, int(config.generate.cpus))
    there = sorted(os.sched_getaffinity(0))
    first = (place * width) % len(there)
    return ",".join(str(core) for core in there[first : first + width])
