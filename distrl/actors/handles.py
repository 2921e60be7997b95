"""Handles: the driver's side of each actor, meeting the role protocols.

Payloads stay behind object references: the driver awaits a group's metadata and hands
the reference on, so tokens go from generator to scorer to learner without it. Groups travel
to and from generators and scorers in batches (`batching.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from distrl.actors.batching import Counter, lost, packed
from distrl.actors.process import end_group, node_id, remove, tail
from distrl.actors.sending import deadline, send
from distrl.checkpoint import CheckpointError
from distrl.learn.spec import Place
from distrl.records import (
    GroupInfo,
    Offer,
    Parcel,
    Prompt,
    Receiver,
    ScoredInfo,
    StepReport,
    Weights,
)
from distrl.roles import EngineFailed, LearnerFailed, PayloadLost, WorkerDied

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 10
"""An actor that has not ended of itself by then is killed."""

LAST_WORDS_S = 5
"""After a rank of the learner has failed, the others have so long to tell more."""

ASIDE = "aside"
"""Calls of the learner that run beside its step, where its actor was made with such a group."""


class ActorHandle:
    """An actor that can be made again, with the log that tells why it ended."""

    def __init__(
        self, name: str, make: Callable[[], Any], log: Path, start_timeout_s: float
    ) -> None:
        self.name = name
        self._make = make
        self._log = log
        self._start_timeout_s = start_timeout_s
        self.actor: Any = None
        self.node = ""

    async def start(self) -> None:
        """Make the actor and wait until it serves. Raises WorkerDied."""
        self.actor = self._make()
        try:
            async with asyncio.timeout(self._start_timeout_s):
                self.node = await self.alive(self.actor.node.remote())
                await self.come_up()
        except EngineFailed as error:
            raise WorkerDied(f"{error}\n{tail(self._log)}") from error
        except TimeoutError:
            raise WorkerDied(
                f"{self.name} did not start within {self._start_timeout_s:g} s; {tail(self._log)}"
            ) from None

    async def come_up(self) -> None:
        """What is still to be done once the actor's process is there."""

    async def restart(self) -> None:
        """End the actor, if it is still there, and make another."""
        logger.warning("restarting %s; its log: %s", self.name, self._log)
        await self.close()
        await self.start()

    async def close(self) -> None:
        """End the actor. May be called twice."""
        actor, self.actor = self.actor, None
        if actor is None:
            return
        with contextlib.suppress(RayActorError, RayTaskError, TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await actor.close.remote()
        ray.kill(actor)

    async def alive(self, reference: Any) -> Any:
        """Await a call; an actor that is gone becomes WorkerDied with its last words, an object
        that is gone, of those it was given or gave, PayloadLost.

        What the actor itself raised is raised here as it was there.
        """
        try:
            return await reference
        except RayActorError as error:
            raise WorkerDied(
                f"{self.name} died: {_first_line(error)}\n{tail(self._log)}"
            ) from error
        except ObjectLostError as error:
            raise lost(self.name, error) from error
        except RayTaskError as error:
            if isinstance(error.cause, ObjectLostError):
                raise lost(self.name, error) from error
            raise error.cause from error

    def running(self) -> Any:
        """The actor. Raises WorkerDied where there is none."""
        if self.actor is None:
            raise WorkerDied(f"{self.name} is not running")
        return self.actor


class DeskHandle(ActorHandle, ABC):
    """An actor with a `Desk`: asked for groups in batches."""

    _counter: Counter | None = None

    def counter(self) -> Counter:
        """The counter of the actor as it is now. Raises WorkerDied where there is none."""
        actor = self.running()
        if self._counter is None:
            self._counter = Counter(actor, self.take, self.alive)
        return self._counter

    @abstractmethod
    async def take(self, batch: Sequence[tuple[int, Any]]) -> None:
        """Send (ticket, question) pairs to the actor."""

    async def close(self) -> None:
        await super().close()
        if self._counter is not None:
            self._counter.close()
            self._counter = None


class GeneratorHandle(DeskHandle):
    """The `Generator` role over an actor."""

    learner: LearnerHandle
    engine_workers: int = 1
    sync_timeout_s: float = 120
    _left: Sequence[Path] = ()
    _process: psutil.Process | None = None
    _starts = 0

    async def come_up(self) -> None:
        """Start the engine. It may be killed at any moment of that too, so what a kill would leave
        is asked for before as well as after."""
        actor = self.running()
        self._starts += 1
        pid = await self.alive(actor.pid.remote())
        if self.node == node_id():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process = psutil.Process(pid)
        self._left = await self.alive(actor.left_when_killed.remote())
        await self.alive(actor.start.remote())
        self._left = await self.alive(actor.left_when_killed.remote())

    async def close(self) -> None:
        """An engine that was killed cannot tidy up, nor one that is only starting be told to end:
        what is left of either on this machine is ended and removed here."""
        await super().close()
        process, self._process = self._process, None
        if process is not None:
            await asyncio.to_thread(end_group, process)
        left, self._left = self._left, ()
        if left and self.node == node_id():
            for path in left:
                remove(path)

    async def generate(self, prompt: Prompt) -> Parcel[GroupInfo]:
        return await self.counter().ask(prompt)

    async def take(self, batch: Sequence[tuple[int, Prompt]]) -> None:
        await self.alive(self.running().take.remote(batch))

    async def hold(self, groups: int) -> None:
        await self.alive(self.running().hold.remote(groups))

    async def load_weights(self, weights: Weights) -> None:
        """Through memory, or sent by the learner, as the weights say.

        Through memory, the image goes through the object store to another machine. All of it is
        under `sync.timeout_s`: raises WorkerDied where it is late.
        """
        actor = self.running()
        if weights.transport != "shm":
            await send(weights, self.learner, self._receiver(), partial(self._receive, weights))
            return
        async with deadline(self.name, weights, self.sync_timeout_s):
            if self.node == self.learner.node:
                await self.alive(actor.load_weights.remote(weights))
            else:
                image = self.learner.image(weights)
                await self.alive(actor.relay_weights.remote(weights, image))

    async def _receive(self, weights: Weights, offer: Offer) -> None:
        await self.alive(self.running().load_weights.remote(weights, offer))

    def _receiver(self) -> Receiver:
        """The engine as it is now, for the learner to send to."""
        return Receiver(
            name=self.name,
            start=self._starts,
            workers=self.engine_workers,
            near=self.node == self.learner.node,
            timeout_s=self.sync_timeout_s,
        )


class ScorerHandle(DeskHandle):
    """The `Scorer` role over an actor."""

    async def score(self, group: Parcel[GroupInfo]) -> Parcel[ScoredInfo]:
        return await self.counter().ask(group)

    async def take(self, batch: Sequence[tuple[int, Parcel[GroupInfo]]]) -> None:
        tickets = [(ticket, group.info) for ticket, group in batch]
        where, batches = packed(group.payload for _, group in batch)
        await self.alive(self.running().take.remote(tickets, where, *batches))


class LearnerHandle(ActorHandle):
    """The `Learner` role over an actor, or over several that share its work: this one is rank 0,
    `others` are the rest, and each call goes to all. It is not restarted: its state is the run's.
    """

    sync_timeout_s: float = 120

    def __init__(
        self,
        name: str,
        make: Callable[[], Any],
        log: Path,
        start_timeout_s: float,
        others: Sequence[ActorHandle] = (),
        place: Place | None = None,
    ) -> None:
        """place: what each rank is told of it, but for its number and where they meet; None: there
        is one process and nothing to share."""
        super().__init__(name, make, log, start_timeout_s)
        self._ranks: list[ActorHandle] = [self, *others]
        self._place = place
        self._image: tuple[int, Any] | None = None

    async def come_up(self) -> None:
        """Have the ranks meet, and load."""
        await asyncio.gather(*(rank.start() for rank in self._ranks[1:]))
        if self._place is None:
            return await self.alive(self.running().begin.remote(None))
        here = len({rank.node for rank in self._ranks}) == 1
        address = await self.alive(self.running().meeting_point.remote(on_one_machine=here))
        await self._all(
            rank.running().begin.remote(replace(self._place, rank=number, address=address))
            for number, rank in enumerate(self._ranks)
        )

    async def close(self) -> None:
        await asyncio.gather(super().close(), *(rank.close() for rank in self._ranks[1:]))

    async def learn(self, payloads: Sequence[Any], *, oldest: int = 0) -> StepReport:
        where, batches = packed(payloads)
        return await self._call("learn", where, oldest, *batches)

    async def publish(self) -> Weights:
        """Raises LearnerFailed where it takes longer than `sync.timeout_s`: nobody else can."""
        limit = asyncio.timeout(self.sync_timeout_s)
        try:
            async with limit:
                return await self._call("publish")
        except TimeoutError:
            if not limit.expired():
                raise
            raise LearnerFailed(
                f"{self.name}: its weights were not published within "
                f"sync.timeout_s={self.sync_timeout_s:g}; its process may have been stopped. If a "
                "model of this size takes longer, raise sync.timeout_s and go on with --resume\n"
                f"{tail(self._log)}"
            ) from None

    async def save(self, folder: Path) -> None:
        """Raises CheckpointError where what a rank wrote cannot be seen from here."""
        files = [file for each in await self._answers("save", folder) for file in each]
        missing = await asyncio.to_thread(lambda: [f.name for f in files if not f.is_file()])
        if missing:
            raise CheckpointError(
                f"the learner wrote {', '.join(missing)} on another machine, and they are not in "
                f"{folder} here: run.root has to lie on storage that all of the learner's machines "
                "share with this one (cluster/README.md)"
            )

    async def load(self, folder: Path) -> None:
        await self._call("load", folder)

    async def export(self, folder: Path) -> None:
        await self._call("export", folder)

    def image(self, weights: Weights) -> Any:
        """A reference to a version's bytes: put into the object store once, by the learner, beside
        its step."""
        if self._image is None or self._image[0] != weights.version:
            self._image = (weights.version, self._beside("image", weights))
        return self._image[1]

    async def offer(self, weights: Weights, receiver: Receiver) -> Offer:
        """Have a version ready for one engine. Raises RoleError where it is not kept any more."""
        return await self.alive(self._beside("offer", weights, receiver))

    async def send(self, name: str) -> None:
        """Send generator `name` what it was offered. Raises RoleError."""
        await self.alive(self._beside("send", name))

    def hang_up(self, name: str) -> None:
        """Have the learner give up what it sends to generator `name`; waits for nothing."""
        if self.actor is not None:
            self._beside("hang_up", name)

    def _beside(self, method: str, *arguments: Any) -> Any:
        """A call of rank 0 that does not wait for the learner's step."""
        call = getattr(self.running(), method).options(concurrency_group=ASIDE)
        return call.remote(*arguments)

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Rank 0's answer, once all ranks have answered."""
        return (await self._answers(method, *arguments))[0]

    async def _answers(self, method: str, *arguments: Any) -> list[Any]:
        """Every rank's answer. Raises LearnerFailed where one dies."""
        try:
            return await self._all(
                getattr(rank.running(), method).remote(*arguments) for rank in self._ranks
            )
        except WorkerDied as error:
            raise LearnerFailed(str(error)) from error
        except PayloadLost as error:
            raise LearnerFailed(
                f"{error}\nA machine of the cluster has gone; go on with --resume: what was ready "
                "for the learner is generated again"
            ) from error

    async def _all(self, references: Iterable[Any]) -> list[Any]:
        """Every rank's answer. Where one dies the others fail for want of it: then its own last
        words are raised."""
        answers = [
            asyncio.ensure_future(rank.alive(reference))
            for rank, reference in zip(self._ranks, references, strict=True)
        ]
        try:
            ended, pending = await asyncio.wait(answers, return_when=asyncio.FIRST_EXCEPTION)
            if pending:
                more, _ = await asyncio.wait(pending, timeout=LAST_WORDS_S)
                ended |= more
        finally:
            for answer in answers:
                answer.cancel()
        failures = [error for answer in ended if (error := answer.exception()) is not None]
        for error in failures:
            if isinstance(error, WorkerDied):
                raise error
        if failures:
            raise failures[0]
        return [answer.result() for answer in answers]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
