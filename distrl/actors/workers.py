"""The actors: each wraps the plain class of its room and adds a process to it.

Only that process imports the room: torch and vLLM take ten seconds, which the driver and the
other actors need not spend.

A generator whose engine is gone, or a scorer whose thread hangs, ends its own process with
`os._exit`: Ray would otherwise count it as alive (and `exit_actor` as finished on purpose).
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from distrl.actors.batching import Desk, Outcomes, unpacked
from distrl.actors.process import keep_to, left_when_killed, log_to, node_id
from distrl.config import ScoreConfig, SyncConfig
from distrl.generate.engine import EngineSpec
from distrl.learn.allocator import keep_freed_memory
from distrl.learn.spec import LearnerSpec, Place
from distrl.records import (
    GroupInfo,
    Offer,
    Parcel,
    Prompt,
    Receiver,
    Rollout,
    ScoredInfo,
    ScoredRollout,
    StepReport,
    Weights,
)
from distrl.roles import RoleError, WorkerDied

if TYPE_CHECKING:
    from distrl.learn.learner import PolicyLearner
    from distrl.sync.collective import Switchboard

log = logging.getLogger(__name__)

Cores = tuple[int, ...] | None
"""CPU cores that an actor keeps to once it has started, with all that it started; None: any.
Until then it takes what is free: most of a start is imports, and some actors have more of them."""

DEAD_ENGINE = 75
"""Exit status of an actor whose engine died."""

LAST_WORDS_S = 5
"""A scorer that hangs ends so much later: its answers say which group it hangs at."""


def _begin(path: Path) -> None:
    os.setpgid(0, 0)  # a terminal's Ctrl-C is for the driver, which ends its actors in order
    log_to(path)
    keep_freed_memory()
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")


class GeneratorActor:
    """`VLLMGenerator` in a process of its own; many calls at once."""

    def __init__(
        self, name: str, spec: EngineSpec, sync: SyncConfig, log_path: Path, cores: Cores = None
    ) -> None:
        _begin(log_path)
        from distrl.generate.generator import VLLMGenerator
        from distrl.sync.memory import SharedMemoryPublisher

        self.cores = cores
        self.generator = VLLMGenerator(name, spec, sync)
        self.images = SharedMemoryPublisher()
        self.desk = Desk()
        self.closing = False

    async def node(self) -> str:
        return node_id()

    async def start(self) -> None:
        await self.generator.start()
        keep_to(self.cores)

    def pid(self) -> int:
        return os.getpid()

    def left_when_killed(self) -> list[Path]:
        return left_when_killed()

    async def take(self, batch: Sequence[tuple[int, Prompt]]) -> None:
        """Begin to generate these; `give` brings them back."""
        for ticket, prompt in batch:
            self.desk.take(ticket, self._generate(prompt))

    @ray.method(num_returns=2)
    async def give(self) -> tuple[Outcomes, list[Rollout]]:
        return await self.desk.give()

    async def drop(self, ticket: int) -> None:
        self.desk.drop(ticket)

    async def _generate(self, prompt: Prompt) -> tuple[GroupInfo, Rollout]:
        try:
            parcel = await self.generator.generate(prompt)
        except WorkerDied as error:
            self._end_unless_closing(error)
            raise
        return parcel.info, parcel.payload

    async def hold(self, groups: int) -> None:
        await self.generator.hold(groups)

    async def load_weights(self, weights: Weights, offer: Offer | None = None) -> None:
        try:
            await self.generator.load_weights(weights, offer)
        except WorkerDied as error:
            self._end_unless_closing(error)
            raise

    async def relay_weights(self, weights: Weights, image: np.ndarray) -> None:
        """Take on weights whose image came from another machine. The driver's deadline holds for
        the way here and for the copy, the generator's own for the rest."""
        path = await asyncio.to_thread(self.images.relay, image.data)
        await self.load_weights(replace(weights, locator=path))

    async def close(self) -> None:
        """Stop the engine, and give it the time to free its shared memory."""
        self.closing = True
        await self.generator.close()
        self.images.close()

    def _end_unless_closing(self, error: WorkerDied) -> None:
        """An engine that is stopped on purpose takes its requests in flight with it."""
        if not self.closing:
            _end(error)


class ScorerActor:
    """`LocalScorer` in a process of its own; concurrent calls share forward passes."""

    def __init__(
        self,
        name: str,
        config: ScoreConfig,
        policy: Path,
        threads: int | None,
        log_path: Path,
        cores: Cores = None,
    ) -> None:
        _begin(log_path)
        from distrl.data.tokenizer import load_tokenizer
        from distrl.models.crew import ALONE, Crew
        from distrl.score.scorer import LocalScorer

        crew = ALONE if threads is None else Crew.of_cores(threads)
        self.scorer = LocalScorer(config, load_tokenizer(policy), name, crew=crew)
        keep_to(cores)
        self.desk = Desk()

    async def node(self) -> str:
        return node_id()

    async def take(
        self,
        batch: Sequence[tuple[int, GroupInfo]],
        where: Sequence[tuple[int, int]],
        *batches: Sequence[Rollout],
    ) -> None:
        """Begin to score these; `give` brings them back."""
        for (ticket, info), rollout in zip(batch, unpacked(where, batches), strict=True):
            self.desk.take(ticket, self._score(info, rollout))

    @ray.method(num_returns=2)
    async def give(self) -> tuple[Outcomes, list[ScoredRollout]]:
        return await self.desk.give()

    async def drop(self, ticket: int) -> None:
        self.desk.drop(ticket)

    async def _score(self, info: GroupInfo, rollout: Rollout) -> tuple[ScoredInfo, ScoredRollout]:
        try:
            parcel = await self.scorer.score(Parcel(info=info, payload=rollout))
        except WorkerDied as error:
            asyncio.get_running_loop().call_later(LAST_WORDS_S, _end, error)
            raise
        return parcel.info, parcel.payload

    async def close(self) -> None:
        await self.scorer.close()


class LearnerActor:
    """`PolicyLearner`, or one rank of it, in a process of its own; one call at a time.

    `image`, `offer`, `send` and `hang_up` may run beside the others: they touch published images
    alone.
    """

    learner: PolicyLearner
    switchboard: Switchboard

    def __init__(self, spec: LearnerSpec, log_path: Path, cores: Cores = None) -> None:
        _begin(log_path)
        self.spec, self.cores = spec, cores

    def node(self) -> str:
        return node_id()

    def meeting_point(self, *, on_one_machine: bool) -> str:
        """host:port at which the other ranks can reach this one."""
        host = _address(on_one_machine)
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def begin(self, place: Place | None) -> None:
        """Load the networks; with a place, as one of several ranks."""
        from distrl.learn.learner import PolicyLearner
        from distrl.sync.collective import Switchboard

        self.switchboard = Switchboard()
        self.learner = PolicyLearner(replace(self.spec, place=place))
        if self.spec.config.compile:
            self.learner.compile_probe()
        keep_to(self.cores)

    def learn(
        self, where: Sequence[tuple[int, int]], oldest: int, *batches: Sequence[ScoredRollout]
    ) -> StepReport:
        return self.learner.learn(unpacked(where, batches), oldest=oldest)

    def publish(self) -> Weights:
        return self.learner.publish()

    def image(self, weights: Weights) -> np.ndarray:
        """The bytes of a version that this learner still holds."""
        from distrl.sync.memory import hold

        with hold(weights.locator, weights.version) as file:
            return np.fromfile(file, dtype=np.uint8)

    def offer(self, weights: Weights, receiver: Receiver) -> Offer:
        """Have a version ready to be sent. Raises RoleError where it is not kept any more."""
        with failure_as_role_error():
            return self.switchboard.offer(weights, receiver, _address(receiver.near))

    def send(self, name: str) -> None:
        """Send generator `name` what it was offered. Raises RoleError; its engine may hold half."""
        with failure_as_role_error():
            self.switchboard.send(name)

    def hang_up(self, name: str) -> None:
        """Give up what is being sent to generator `name`, and its group."""
        self.switchboard.hang_up(name)

    def save(self, folder: Path) -> list[Path]:
        return self.learner.save(folder)

    def load(self, folder: Path) -> None:
        self.learner.load(folder)

    def export(self, folder: Path) -> None:
        self.learner.export(folder)

    def close(self) -> None:
        self.switchboard.close()
        self.learner.close()


def _address(on_one_machine: bool) -> str:
    """Where others reach this process: nowhere else than needed."""
    return "127.0.0.1" if on_one_machine else ray.util.get_node_ip_address()


@contextmanager
def failure_as_role_error() -> Iterator[None]:
    """The driver must not need this room's libraries to read an error."""
    from distrl.sync.collective import TransferFailed

    try:
        yield
    except TransferFailed as error:
        log.warning("not sent: %s", error)
        raise RoleError(str(error)) from None


def _end(error: BaseException) -> None:
    """End this process so that Ray sees a death, with the cause in the log."""
    log.critical("ending this process: %s", error, exc_info=error)
    logging.shutdown()
    os._exit(DEAD_ENGINE)


def remote(cls: type, groups: Mapping[str, int] | None = None) -> Any:
    """The Ray actor class of a plain class; it is never restarted or retried by Ray itself.

    groups: calls that run beside the others, by name of the group: how many at once. Without
    any, a class like the learner's runs its calls in the main thread, otherwise in one other.
    """
    beside: dict[str, Any] = {"concurrency_groups": dict(groups)} if groups else {}
    return ray.remote(max_restarts=0, max_task_retries=0, **beside)(cls)
