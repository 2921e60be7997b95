"""Handles: a death is told with its last words, an error as it was, and restarts work."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from distrl.actors import handles, sending
from distrl.actors.batching import Desk
from distrl.actors.handles import ASIDE, ActorHandle, GeneratorHandle, LearnerHandle
from distrl.actors.process import end_group, log_to, node_id, tail
from distrl.actors.workers import remote
from distrl.learn.spec import Place
from distrl.records import GroupInfo, Prompt, Rollout, Sample, VersionSpan, Weights
from distrl.roles import CanaryMismatch, EngineFailed, LearnerFailed, WorkerDied

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


class Worker:
    """An actor with a log, and every way to go wrong."""

    def __init__(
        self, log: Path, started: float = 0, refuse: bool = False, engine: bool = True
    ) -> None:
        log_to(log)
        self.queue = log.with_suffix(".queue")
        self.sockets = log.with_suffix(".sockets")
        self.started = started
        self.engine = engine
        self.stuck = log.with_suffix(".stuck")
        self.desk = Desk()
        if refuse:
            raise ValueError("cannot be made")

    async def node(self) -> str:
        print("served", flush=True)
        return node_id()

    async def start(self) -> None:
        await asyncio.sleep(self.started)
        if not self.engine:
            print("ValueError: 500 GiB are more than there are", flush=True)
            raise EngineFailed("g0: the engine did not start: see above")

    async def begin(self, place: Place | None) -> None:
        print(f"began at {place}", flush=True)

    async def meeting_point(self, *, on_one_machine: bool) -> str:
        return "127.0.0.1:1" if on_one_machine else "elsewhere:1"

    async def left_when_killed(self) -> list[Path]:
        self.queue.touch()
        self.sockets.mkdir(exist_ok=True)
        (self.sockets / "one").touch()
        return [self.queue, self.sockets]

    async def pid(self) -> int:
        return os.getpid()

    async def mismatch(self) -> None:
        raise CanaryMismatch("off by 2 nats")

    async def bug(self) -> None:
        raise ZeroDivisionError("somewhere deep")

    async def end(self) -> None:
        sys.stderr.write("the engine is gone\n")
        sys.stderr.flush()
        os._exit(75)

    async def hang(self) -> None:
        await asyncio.sleep(600)

    async def close(self) -> None:
        print("closed", flush=True)

    # -- the generator's and the learner's part of a sync

    async def take(self, batch: list[tuple[int, Prompt]]) -> None:
        for ticket, prompt in batch:
            self.desk.take(ticket, self.generate(prompt))

    @ray.method(num_returns=2)
    async def give(self) -> Any:
        return await self.desk.give()

    async def drop(self, ticket: int) -> None:
        self.desk.drop(ticket)

    async def generate(self, prompt: Prompt) -> tuple[GroupInfo, Rollout]:
        sample = Sample(
            text="x",
            token_ids=np.array([5], dtype=np.int32),
            logprobs=np.zeros(1, dtype=np.float32),
            spans=(VersionSpan(version=0, start=0, end=1),),
            finish_reason="stop",
        )
        rollout = Rollout(prompt=prompt, samples=(sample,), generator="g")
        return GroupInfo.of(rollout, 0.5), rollout

    async def load_weights(self, weights: Weights) -> None:
        await self.hang_where_stuck("load")
        print(f"loaded {weights.version} from {weights.locator}", flush=True)

    async def relay_weights(self, weights: Weights, image: np.ndarray) -> None:
        await self.hang_where_stuck("relay")
        print(f"relayed {weights.version}: {image.tolist()}", flush=True)

    async def hang_where_stuck(self, where: str) -> None:
        if self.stuck.exists() and self.stuck.read_text() == where:
            await self.hang()

    async def publish(self) -> Weights:
        await self.hang_where_stuck("publish")
        return weights(7)

    async def image(self, weights: Weights) -> np.ndarray:
        await self.hang_where_stuck("image")
        print(f"image of {weights.version}", flush=True)
        return np.array([weights.version], dtype=np.uint8)


def handle(log: Path, kind: type = ActorHandle, timeout_s: float = 60, **options: Any) -> Any:
    actor = remote(Worker, {ASIDE: 4}).options(num_cpus=0, max_concurrency=10)
    return kind("worker-0", lambda: actor.remote(log, **options), log, timeout_s)


async def test_a_death_is_told_with_its_last_words(tmp_path: Path) -> None:
    worker = handle(tmp_path / "log")
    await worker.start()
    pid = await worker.alive(worker.running().pid.remote())
    with pytest.raises(WorkerDied) as death:
        await worker.alive(worker.running().end.remote())
    said = str(death.value)
    assert said.startswith("worker-0 died: ")
    assert f"last lines of {tmp_path / 'log'}:" in said
    assert said.endswith("the engine is gone")
    await gone(pid)

    await worker.restart()
    assert await worker.alive(worker.running().pid.remote()) != pid
    assert worker.node == ray.nodes()[0]["NodeID"]
    await worker.close()
    await worker.close()
    with pytest.raises(WorkerDied, match="worker-0 is not running"):
        worker.running()


async def test_calls_in_flight_die_with_the_actor(tmp_path: Path) -> None:
    worker = handle(tmp_path / "log")
    await worker.start()
    waiting = asyncio.ensure_future(worker.alive(worker.running().hang.remote()))
    pid = await worker.alive(worker.running().pid.remote())
    psutil.Process(pid).kill()
    with pytest.raises(WorkerDied):
        await asyncio.wait_for(waiting, 30)
    await worker.close()


async def test_what_an_actor_raises_arrives_as_it_was(tmp_path: Path) -> None:
    worker = handle(tmp_path / "log")
    await worker.start()
    with pytest.raises(CanaryMismatch) as mismatch:
        await worker.alive(worker.running().mismatch.remote())
    assert str(mismatch.value) == "off by 2 nats", "no traceback of another process"
    with pytest.raises(ZeroDivisionError) as bug:
        await worker.alive(worker.running().bug.remote())
    assert "in bug" in str(bug.value.__cause__), "but it can be found"
    await worker.close()


async def test_an_actor_that_does_not_come_up(tmp_path: Path) -> None:
    # On a busy machine Ray alone may take ten seconds to make the process.
    slow = handle(tmp_path / "slow", GeneratorHandle, timeout_s=30, started=600)
    with pytest.raises(WorkerDied, match="worker-0 did not start within 30 s"):
        await slow.start()
    left = [tmp_path / "slow.queue", tmp_path / "slow.sockets"]
    assert all(path.exists() for path in left)
    await slow.close()
    assert not any(path.exists() for path in left), "an engine that never served leaves files too"
    without = handle(tmp_path / "without", GeneratorHandle, engine=False)
    with pytest.raises(WorkerDied, match=r"did not start: see above(.|\n)*500 GiB are more"):
        await without.start()
    await without.close()
    refused = handle(tmp_path / "refused", refuse=True)
    with pytest.raises(WorkerDied) as death:
        await refused.start()
    assert "cannot be made" in str(death.value)
    await refused.close()


async def test_closing_does_not_wait_for_one_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handles, "CLOSE_TIMEOUT_S", 0.5)
    worker = handle(tmp_path / "log")
    await worker.start()
    actor = worker.running()
    pid = await actor.pid.remote()
    actor.close = actor.hang
    await asyncio.wait_for(worker.close(), 10)
    await gone(pid)


async def gone(pid: int) -> None:
    async with asyncio.timeout(20):
        while psutil.pid_exists(pid):
            await asyncio.sleep(0.1)


def weights(version: int) -> Weights:
    return Weights(
        version=version,
        transport="shm",
        locator="/proc/1/fd/0",
        nbytes=1,
        probe_ids=np.zeros(2, dtype=np.int32),
        probe_logprobs=np.zeros(1, dtype=np.float32),
    )


async def test_weights_go_by_image_to_another_machine_and_by_path_on_this_one(
    tmp_path: Path,
) -> None:
    learner = handle(tmp_path / "learner", LearnerHandle)
    near, far = (handle(tmp_path / name, GeneratorHandle) for name in ("near", "far"))
    for worker in (learner, near, far):
        await worker.start()
    near.learner = far.learner = learner
    far.node = "elsewhere"
    for version in (1, 2):
        await near.load_weights(weights(version))
        await far.load_weights(weights(version))
        await far.load_weights(weights(version))
    assert "loaded 1 from /proc/1/fd/0" in (tmp_path / "near").read_text()
    assert (tmp_path / "far").read_text().count("relayed 2: [2]") == 2
    assert (tmp_path / "learner").read_text().count("image of 2") == 1, "one image a version"
    for worker in (learner, near, far):
        await worker.close()


async def test_a_sync_that_hangs_ends_at_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator is given up, the learner ends the run; the setting is named."""
    monkeypatch.setattr(sending, "LAST_WORDS_S", 0.1)
    learner = handle(tmp_path / "learner", LearnerHandle)
    generator = handle(tmp_path / "generator", GeneratorHandle)
    for worker in (learner, generator):
        await worker.start()
    generator.learner, here = learner, generator.node
    assert (await learner.publish()).version == 7
    learner.sync_timeout_s = generator.sync_timeout_s = 0.5
    late = r"worker-0: version \d was neither loaded nor given up .* raise sync.timeout_s"
    trouble = [("generator", "load", here), ("generator", "relay", "far"), ("learner", "image", "")]
    for version, (who, where, generator.node) in enumerate(trouble, 1):
        (tmp_path / f"{who}.stuck").write_text(where)
        async with asyncio.timeout(30):
            with pytest.raises(WorkerDied, match=late):
                await generator.load_weights(weights(version))
    (tmp_path / "learner.stuck").write_text("publish")
    async with asyncio.timeout(30):
        with pytest.raises(LearnerFailed, match=r"not published within sync.timeout_s=0.5;"):
            await learner.publish()
    await asyncio.sleep(0.01)  # to let the cancelled ones end
    assert len(asyncio.all_tasks()) == 1, "nobody is left waiting"
    for worker in (learner, generator):
        await worker.close()


async def test_tokens_stay_behind_a_reference(tmp_path: Path) -> None:
    generator = handle(tmp_path / "log", GeneratorHandle)
    await generator.start()
    prompt = Prompt(
        index=3, epoch=0, prompt_id="p", text="t", token_ids=np.array([1], dtype=np.int32)
    )
    parcel = await generator.generate(prompt)
    assert (parcel.info.index, parcel.info.lengths) == (3, (1,))
    assert isinstance(parcel.payload.batch, ray.ObjectRef)
    assert (await parcel.payload).samples[0].token_ids.tolist() == [5]
    await generator.close()


async def test_what_a_killed_engine_leaves_is_removed_on_this_machine(tmp_path: Path) -> None:
    near, far = (handle(tmp_path / name, GeneratorHandle) for name in ("near", "far"))
    for worker in (near, far):
        await worker.start()
        ray.kill(worker.running())
    far.node = "elsewhere"
    for worker in (near, far):
        await worker.close()
    assert not (tmp_path / "near.queue").exists() and not (tmp_path / "near.sockets").exists()
    assert (tmp_path / "far.queue").exists()


async def test_a_learner_that_dies_ends_the_run(tmp_path: Path) -> None:
    learner = handle(tmp_path / "log", LearnerHandle)
    await learner.start()
    with pytest.raises(LearnerFailed, match="the engine is gone"):
        await learner._call("end")
    await learner.close()


def ranks(folder: Path, start_timeout_s: float = 60) -> LearnerHandle:
    """A learner of three."""
    makers = [handle(folder / f"rank{n}", ActorHandle, start_timeout_s) for n in range(3)]
    first, *others = makers
    return LearnerHandle(
        "learner", first._make, first._log, start_timeout_s, others, Place(world=3, timeout_s=9)
    )


async def test_ranks_are_told_of_each_other_and_end_together(tmp_path: Path) -> None:
    learner = ranks(tmp_path)
    await learner.start()
    for number in range(3):
        place = Place(rank=number, world=3, address="127.0.0.1:1", timeout_s=9)
        assert f"began at {place}" in (tmp_path / f"rank{number}").read_text()
    pids = [await rank.running().pid.remote() for rank in learner._ranks]
    await learner.close()
    assert all("closed" in (tmp_path / f"rank{number}").read_text() for number in range(3))
    for pid in pids:
        await gone(pid)


async def test_the_death_of_one_rank_is_told_and_not_the_failures_that_come_of_it(
    tmp_path: Path,
) -> None:
    learner = ranks(tmp_path)
    await learner.start()
    _, doomed, _ = learner._ranks
    ended = [rank.running().hang for rank in learner._ranks]
    ended[0], ended[1] = learner.running().bug, doomed.running().end
    with pytest.raises(WorkerDied, match=r"rank1:\n(?s:.*)the engine is gone"):
        await learner._all(call.remote() for call in ended)
    await learner.close()


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log) == f"(no log at {log})"
    log.write_text("\n".join(f"line {k}" for k in range(100)))
    assert tail(log, 2) == f"last lines of {log}:\nline 98\nline 99"


STARTS_ONE = """
import subprocess, sys, time
from multiprocessing import shared_memory
memory = shared_memory.SharedMemory(create=True, size=64)  # watched by a resource tracker
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(below.pid, memory.name, flush=True)
time.sleep(600)
"""


def test_a_process_is_ended_with_its_group_and_its_memory_freed() -> None:
    """Whichever way the process itself ended."""
    for before in ("running", "killed"):
        leader = subprocess.Popen(
            [sys.executable, "-c", STARTS_ONE],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            process_group=0,
        )
        assert leader.stdout is not None
        pid, memory = leader.stdout.readline().split()
        known, below = psutil.Process(leader.pid), psutil.Process(int(pid))
        if before == "killed":
            leader.kill()
            leader.wait()
        end_group(known)
        below.wait(60)
        deadline = time.monotonic() + 60
        while Path("/dev/shm", memory).exists():
            assert time.monotonic() < deadline, "the tracker was killed too"
            time.sleep(0.1)
        leader.stdout.close()


TAKES_LEAVE = """
import time
print("ending", flush=True)
time.sleep(0.5)
print("bye", flush=True)
"""


def test_a_process_that_is_ending_may_take_leave() -> None:
    """Of one that is killed while it does, Ray says on the screen that it crashed."""
    words = [sys.executable, "-c", TAKES_LEAVE]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, process_group=0) as leader:
        assert leader.stdout is not None
        assert leader.stdout.readline() == "ending\n"
        end_group(psutil.Process(leader.pid))
        assert leader.stdout.read() == "bye\n"


class Starting(Worker):
    """A generator whose engine is only starting, which keeps it from hearing anything."""

    def __init__(self, log: Path) -> None:
        super().__init__(log)
        os.setpgid(0, 0)

    async def start(self) -> None:
        below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.queue.with_suffix(".pid").write_text(str(below.pid))
        time.sleep(600)


async def test_an_engine_that_is_only_starting_ends_with_its_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handles, "CLOSE_TIMEOUT_S", 0.5)
    log = tmp_path / "starting.log"
    actor = remote(Starting)
    generator = GeneratorHandle("starting", lambda: actor.remote(log), log, 600)
    starting = asyncio.create_task(generator.start())
    note = tmp_path / "starting.pid"
    while not (note.exists() and note.read_text()):
        await asyncio.sleep(0.1)
    engine = psutil.Process(int(note.read_text()))
    await generator.close()
    engine.wait(60)
    with pytest.raises(WorkerDied):
        await starting
