"""A load that takes two: whoever fails, hangs or dies, the other is free and the rest go on."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from distrl.actors import sending
from distrl.actors.handles import ASIDE, GeneratorHandle, LearnerHandle
from distrl.actors.process import log_to, node_id
from distrl.actors.sending import send
from distrl.actors.workers import LearnerActor, remote
from distrl.learn.spec import Place
from distrl.records import Offer, Receiver, Weights
from distrl.roles import CanaryMismatch, RoleError, WorkerDied

# -- the two calls, without actors ----------------------------------------------------------------

OFFER = Offer(host="127.0.0.1", port=1, world=2, tensors=())
RECEIVER = Receiver(name="g0", start=1, workers=1, near=True, timeout_s=0.2)


def weights(version: int = 3) -> Weights:
    return Weights(
        version=version,
        transport="gloo",
        locator="/proc/1/fd/0",
        nbytes=1,
        probe_ids=np.zeros(2, dtype=np.int32),
        probe_logprobs=np.zeros(1, dtype=np.float32),
    )


class Sender:
    def __init__(self, outcome: Exception | None = None, takes_s: float = 0.0) -> None:
        self.outcome, self.takes_s = outcome, takes_s
        self.hung_up: list[str] = []

    async def offer(self, weights: Weights, receiver: Receiver) -> Offer:
        return OFFER

    async def send(self, name: str) -> None:
        await after(self.takes_s, self.outcome)

    def hang_up(self, name: str) -> None:
        self.hung_up.append(name)


async def after(seconds: float, outcome: Exception | None = None, offer: Offer = OFFER) -> None:
    assert offer == OFFER
    await asyncio.sleep(seconds)
    if outcome is not None:
        raise outcome


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "LAST_WORDS_S", 0.3)


def receives(seconds: float = 0.0, outcome: Exception | None = None) -> Any:
    return lambda offer: after(seconds, outcome, offer)


async def test_both_succeed() -> None:
    sender = Sender()
    await send(weights(), sender, RECEIVER, receives())
    assert not sender.hung_up


async def test_a_mismatch_leaves_the_group_as_it_is() -> None:
    sender = Sender()
    with pytest.raises(CanaryMismatch, match="off"):
        await send(weights(), sender, RECEIVER, receives(outcome=CanaryMismatch("off")))
    assert not sender.hung_up


FAILURES: dict[str, tuple[Sender, Any, str]] = {
    "the receiver dies": (Sender(takes_s=9), receives(0, WorkerDied("gone")), "^gone$"),
    "the sender fails, the receiver hangs": (
        Sender(RoleError("did not come")),
        receives(9),
        "g0: version 3 was not sent: did not come",
    ),
    "both fail, the receiver last": (
        Sender(RoleError("reset")),
        receives(0.1, WorkerDied("g0 died: its last words")),
        "g0 died: its last words; reset",
    ),
    "the sender fails, the receiver knows nothing of it": (
        Sender(RoleError("reset")),
        receives(),
        "was not sent: reset",
    ),
    "both hang": (Sender(takes_s=9), receives(9), "neither loaded nor given up"),
    "the receiver hangs": (Sender(), receives(9), "neither loaded nor given up"),
}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("case", FAILURES)
async def test_any_failure_frees_both_and_is_a_death(case: str) -> None:
    sender, receive, said = FAILURES[case]
    began = time.monotonic()
    with pytest.raises(WorkerDied, match=said):
        await send(weights(), sender, RECEIVER, receive)
    assert time.monotonic() - began < 2
    assert sender.hung_up == ["g0"]
    await asyncio.sleep(0.01)  # to let the cancelled ones end
    assert len(asyncio.all_tasks()) == 1, "nobody is left waiting"


async def test_who_is_cancelled_hangs_up() -> None:
    sender = Sender(takes_s=9)
    load = asyncio.create_task(send(weights(), sender, RECEIVER, receives(9)))
    await asyncio.sleep(0.05)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert sender.hung_up == ["g0"]


# -- real actors, real groups; only the networks and the engine are missing ------------------------

# Told by the death and not by a deadline: that one is longer than any test may take, so that on a
# busy machine, too, the two are far apart.
LONG_S = 600
SOON_S = 200


class SlowLearner(LearnerActor):
    """The real actor around a learner whose step takes long."""

    def begin(self, place: Place | None) -> None:
        from distrl.sync.collective import Switchboard

        self.switchboard = Switchboard()
        self.learner: Any = SlowSteps()

    def nap(self, seconds: float) -> float:
        """A step; returns when it ended."""
        time.sleep(seconds)
        return time.monotonic()

    def pid(self) -> int:
        return os.getpid()


class SlowSteps:
    def __init__(self) -> None:
        from distrl.sync.memory import SharedMemoryPublisher

        self.publisher = SharedMemoryPublisher()
        self.version = 0

    def publish(self) -> Weights:
        import torch

        self.version += 1
        tensors = {"w": torch.full((1000,), float(self.version))}
        locator, nbytes = self.publisher.publish(tensors, self.version)
        return Weights(
            version=self.version,
            transport="gloo",
            locator=locator,
            nbytes=nbytes,
            probe_ids=np.zeros(2, dtype=np.int32),
            probe_logprobs=np.zeros(1, dtype=np.float32),
        )

    def close(self) -> None:
        self.publisher.close()


class Engine:
    """A generator's actor that takes what is sent, or does not."""

    def __init__(self, log: Path) -> None:
        log_to(log)
        self.held: Path = log.with_suffix(".held")
        self.trouble: Path = log.with_suffix(".trouble")
        self.met: Any = None

    async def node(self) -> str:
        return node_id()

    async def start(self) -> None: ...

    async def pid(self) -> int:
        return os.getpid()

    async def left_when_killed(self) -> list[Path]:
        return []

    async def load_weights(self, weights: Weights, offer: Offer) -> None:
        trouble = self.trouble.read_text() if self.trouble.exists() else ""
        if trouble == "hang":
            await asyncio.sleep(LONG_S)
        if trouble == "die":
            os._exit(75)
        await asyncio.to_thread(self._take, offer)

    def _take(self, offer: Offer) -> None:
        from distrl.sync.gloo import GlooGroup

        place = (offer.host, offer.port)
        if self.met is None or self.met[0] != place:
            self.met = (place, GlooGroup.join(*place, rank=1, world=offer.world, timeout_s=SOON_S))
        tensors = dict(self.met[1].receive(offer.tensors))
        self.held.write_text(f"{tensors['w'].mean().item():g} at {offer.port}")

    async def close(self) -> None: ...


class Crew:
    """A learner and two generators, as `launch.py` makes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        actor = remote(SlowLearner, {ASIDE: 4}).options(num_cpus=0)
        log = folder / "learner"
        self.learner = LearnerHandle("learner", lambda: actor.remote(None, log), log, SOON_S)
        self.generators = [self._generator(f"g{number}") for number in range(2)]

    def _generator(self, name: str) -> GeneratorHandle:
        actor = remote(Engine).options(num_cpus=0, max_concurrency=10)
        log = self.folder / name
        generator = GeneratorHandle(name, lambda: actor.remote(log), log, SOON_S)
        generator.learner = self.learner
        generator.sync_timeout_s = LONG_S
        return generator

    def held(self, number: int) -> tuple[str, str]:
        """Version and port of the last load."""
        version, _, port = (self.folder / f"g{number}.held").read_text().split()
        return version, port

    def trouble(self, number: int, kind: str) -> None:
        (self.folder / f"g{number}.trouble").write_text(kind)

    async def __aenter__(self) -> Crew:
        await asyncio.gather(*(handle.start() for handle in (self.learner, *self.generators)))
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(handle.close() for handle in (*self.generators, self.learner)))


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
async def test_generators_load_beside_the_learners_step(tmp_path: Path) -> None:
    """Other calls of the learner stay one at a time."""
    async with Crew(tmp_path) as crew:
        published = await crew.learner.publish()
        step = asyncio.ensure_future(crew.learner._call("nap", LONG_S))
        queued = asyncio.ensure_future(crew.learner._call("nap", 0))
        async with asyncio.timeout(SOON_S):
            await asyncio.gather(*(g.load_weights(published) for g in crew.generators))
        assert not step.done() and not queued.done()
        (one, here), (other, there) = crew.held(0), crew.held(1)
        assert one == other == "1" and here != there, "each has a group of its own"
        step.cancel()
        queued.cancel()


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
async def test_one_that_dies_or_hangs_disturbs_nobody_and_comes_back(tmp_path: Path) -> None:
    async with Crew(tmp_path) as crew:
        patient, _ = crew.generators
        await patient.load_weights(await crew.learner.publish())
        _, first_port = crew.held(0)
        for kind, said in (("die", "g0 died: "), ("hang", r"g0: .*g0 \(start 2\) did not come")):
            patient.sync_timeout_s = 3 if kind == "hang" else LONG_S
            crew.trouble(0, kind)
            published = await crew.learner.publish()
            async with asyncio.timeout(SOON_S):
                failed, loaded = await asyncio.gather(
                    *(g.load_weights(published) for g in crew.generators), return_exceptions=True
                )
            assert isinstance(failed, WorkerDied), failed
            with pytest.raises(WorkerDied, match=said):
                raise failed
            assert loaded is None and crew.held(1)[0] == str(published.version)
            patient.sync_timeout_s = LONG_S
            crew.trouble(0, "")
            await patient.restart()
            await patient.load_weights(published)
            version, port = crew.held(0)
            assert version == str(published.version) and port != first_port
            first_port = port


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
async def test_a_learner_that_dies_frees_the_generator(tmp_path: Path) -> None:
    async with Crew(tmp_path) as crew:
        patient = crew.generators[0]
        published = await crew.learner.publish()
        pid = await crew.learner.running().pid.remote()
        crew.trouble(0, "hang")
        load = asyncio.create_task(patient.load_weights(published))
        await asyncio.sleep(3)
        psutil.Process(pid).kill()
        async with asyncio.timeout(SOON_S):
            with pytest.raises(WorkerDied, match="learner died"):
                await load
        with pytest.raises(WorkerDied, match="learner died"):
            await patient.load_weights(published)
