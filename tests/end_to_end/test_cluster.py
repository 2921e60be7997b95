"""On a cluster that is already there: two machines, by the look of it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distrl.cli.main import main
from tests.end_to_end.process import DISTRL, MARK, Run, marked, named

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def machines() -> Iterator[tuple[str, dict[str, str], str]]:
    """Two raylets with two CPUs each and token authentication: (address, environment, mark)."""
    scratch = tempfile.mkdtemp(prefix="ray-")  # short: Ray puts sockets there
    token, mark = uuid.uuid4().hex, uuid.uuid4().hex
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    head = ["--head", f"--port={address.split(':')[1]}", "--include-dashboard=false"]
    nodes: list[subprocess.Popen[bytes]] = []
    for which in (head, [f"--address={address}"]):
        nodes.append(start_ray(which, {**os.environ, **secret, MARK: mark}, Path(scratch)))
    yield address, secret, mark
    for node in reversed(nodes):
        node.terminate()
        node.wait(60)
    left = marked(mark)
    for process in left:
        process.kill()
    shutil.rmtree(scratch, ignore_errors=True)


def start_ray(words: list[str], env: dict[str, str], scratch: Path) -> subprocess.Popen[bytes]:
    """`ray start --block`, ready; its children end with it."""
    log = scratch / f"node-{uuid.uuid4().hex}.log"
    command = [DISTRL.with_name("ray"), "start", *words, "--num-cpus=2", "--block"]
    command += ["--object-store-memory=100000000", "--disable-usage-stats"]
    command += [f"--temp-dir={scratch}", "--node-ip-address=127.0.0.1"]
    with log.open("wb") as output:
        node = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        assert node.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    return node


def test_learner_and_generator_on_two_machines(
    machines: tuple[str, dict[str, str], str], begin: Callable[..., Run]
) -> None:
    """Each machine has room for one of the two, so weights are relayed; adapters are what learns,
    and the engine gets them merged; generation runs ahead of the bound, and what got too old is
    dropped; SIGTERM ends it."""
    address, secret, mark = machines
    placement = ("--learn.cpus", "1.5", "--generate.cpus", "1.5", "--cluster.address", address)
    ahead = ("--driver.lead", "3", "--driver.on_stale", "drop", "--driver.window", "2")
    lora = ("--learn.lora.rank", "4", "--learn.lr", "3e-3")
    run = begin("train", *placement, *ahead, *lora, "--driver.steps", "40", **secret)
    run.wait_for_step(4)
    actors = {p.name()[:9]: p for p in marked(mark) if p.name().startswith("ray::")}
    generator, learner = actors["ray::Gene"], actors["ray::Lear"]
    assert generator.ppid() != learner.ppid(), "both on one machine"
    held = [os.readlink(link) for link in Path(f"/proc/{generator.pid}/fd").iterdir()]
    assert any("distrl-weights" in file for file in held), "the generator holds no relayed image"

    run.process.send_signal(signal.SIGTERM)
    assert run.end(60) == 75, run.output
    steps = run.steps()
    assert steps == list(range(1, steps[-1] + 1))
    lag0 = [row["mismatch/lag0_abs_mean"] for row in run.rows() if "mismatch/lag0_abs_mean" in row]
    assert lag0 and max(lag0) < 1e-4
    assert run.rows()[-1]["kl/ref"] != 0, "the adapters have not reached the engine"
    assert max(row["staleness/max"] for row in run.rows()) <= 1
    assert max(row["driver/lead"] for row in run.rows()) > 1, "it ran ahead of the bound"
    assert main(["audit", str(run.folder)]) == 0
    run.assert_nothing_left(within_s=10)
    names = ("ray::Gene", "ray::Lear", "ray::Scor", "VLLM")
    deadline = time.monotonic() + 10
    while left := [p for p in marked(mark) if named(p, names)]:
        assert time.monotonic() < deadline, f"left on the cluster: {left}"
        time.sleep(0.5)
