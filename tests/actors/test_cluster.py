"""What a run asks of a cluster, and the word on what is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError

from distrl.actors.cluster import (
    Demand,
    PlacementError,
    check_demands,
    connected,
    demands,
    place,
    release,
)
from distrl.actors.launch import generator_cores
from distrl.config import Config

LEARNER = Demand(role="learner", workers=1, cpus=1, gpus=0)
GENERATORS = Demand(role="generator", workers=2, cpus=1, gpus=1)


def config(**sections: Any) -> Config:
    return Config.model_validate(sections)


def test_every_role_is_asked_for() -> None:
    wanted = demands(config(generate={"workers": 3, "cpus": 2, "gpus": 1}, score={"cpus": 0.5}))
    assert [(d.role, d.workers, d.bundle) for d in wanted] == [
        ("learner", 1, {"CPU": 1}),
        ("generator", 3, {"CPU": 2, "GPU": 1}),
        ("scorer", 1, {"CPU": 0.5}),
    ]


def test_a_bundle_is_never_empty() -> None:
    """Ray refuses a bundle without resources."""
    assert Demand(role="scorer", workers=1, cpus=0, gpus=0).bundle == {"CPU": 0.01}


def test_what_fits_passes() -> None:
    check_demands([LEARNER, GENERATORS], [{"CPU": 2, "GPU": 1}, {"CPU": 1, "GPU": 1}])


def test_a_bundle_that_no_machine_holds() -> None:
    with pytest.raises(PlacementError) as refused:
        check_demands([LEARNER, GENERATORS], [{"CPU": 4}, {"GPU": 8}])
    said = str(refused.value)
    assert "hold a generator, which asks for 1 CPU, 1 GPU" in said
    assert "4 CPU; 8 GPU" in said
    assert "generate.cpus or generate.gpus" in said


def test_bundles_that_fit_alone_but_not_together() -> None:
    with pytest.raises(PlacementError) as refused:
        check_demands([LEARNER, GENERATORS], [{"CPU": 2, "GPU": 4}])
    assert "needs 3 CPUs (1 learner(s) x 1, 2 generator(s) x 1)" in str(refused.value)
    assert "the cluster has 2" in str(refused.value)


def test_a_cluster_without_machines() -> None:
    with pytest.raises(PlacementError, match="the machines have: nothing"):
        check_demands([LEARNER], [])


def test_generators_take_cores_from_the_first_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 6, 7})
    two = config(generate={"workers": 2, "cpus": 2})
    assert [generator_cores(two, place) for place in range(3)] == ["2,3", "6,7", "2,3"]
    assert generator_cores(config(generate={"gpus": 1}), 0) is None
    assert generator_cores(config(cluster={"address": "auto"}), 0) is None


def test_a_cluster_that_is_not_there() -> None:
    """Said at once; nothing is begun."""
    for address, said in {
        "127.0.0.1:1": r"cluster\.address='127\.0\.0\.1:1'.*refused.*ray start --head",
        "nobody.invalid:6379": r"cluster\.address='nobody\.invalid:6379'.*ray start --head",
        "127.0.0.1": r"'127\.0\.0\.1' should be the head's host:port",
    }.items():
        with (
            pytest.raises(PlacementError, match=said),
            connected(config(cluster={"address": address})),
        ):
            pytest.fail("joined nothing")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at {asked}.*refused"),
        ("http://127.0.0.1:8265", "{asked} should be the head's host:port"),
        ("ray://127.0.0.1:1", "{asked} should be the head's host:port"),
    ],
)
def test_a_cluster_that_the_environment_names(
    address: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dashboard's address is what 'ray job submit' is given, so it often stands there."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    asked = f"cluster.address='auto', which is RAY_ADDRESS='{address}' of this shell,"
    with (
        pytest.raises(PlacementError, match=said.format(asked=re.escape(asked))),
        connected(config(cluster={"address": "auto"})),
    ):
        pytest.fail("joined nothing")


@pytest.mark.parametrize(
    "error",
    [
        AuthenticationError("Authentication token is missing or incorrect."),
        ConnectionError("Failed to connect to Ray cluster at 192.0.2.2:6379"),
    ],
)
def test_a_cluster_that_asks_for_another_token(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray raises the one where this machine has no token, the other where it is a wrong one."""

    def refused(**_: Any) -> None:
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", refused)
    with (
        pytest.raises(PlacementError, match=r"cluster\.address='auto'") as told,
        connected(config(cluster={"address": "auto"})),
    ):
        pytest.fail("joined nothing")
    said = str(told.value)
    assert str(error)[:30] in said and "RAY_AUTH_MODE=token" in said and "~/.ray/auth_token" in said


def test_folders_of_killed_runs_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead, alive, other = (
        tmp_path / name
        for name in (f"distrl-ray-{gone.pid}-x", f"distrl-ray-{os.getpid()}-x", "distrl-ray-y")
    )
    for folder in (dead, alive, other):
        (folder / "session").mkdir(parents=True)
    with pytest.raises(PlacementError), connected(config(cluster={"address": "127.0.0.1:1"})):
        pass
    assert [folder.exists() for folder in (dead, alive, other)] == [False, True, True]


@pytest.mark.slow
def test_what_others_hold_is_told(local_ray: Config) -> None:
    """Fits the machine, but somebody else has it: a deadline, and the word for it."""
    everything = int(ray.cluster_resources()["CPU"])
    mine = Demand(role="learner", workers=1, cpus=everything, gpus=0)
    held = place([mine], 10)
    try:
        with pytest.raises(PlacementError) as refused:
            place([LEARNER], 1)
    finally:
        release(held)
    said = str(refused.value)
    assert "found no place within cluster.placement_timeout_s=1" in said
    assert "asks for 1 CPU, and free is no CPU" in said
    assert "ray status" in said
    release(place([LEARNER], 10))  # what failed left nothing reserved


@pytest.mark.slow
def test_too_much_is_refused_at_once(local_ray: Config) -> None:
    with pytest.raises(PlacementError, match="no machine of the cluster can hold a generator"):
        place([LEARNER, GENERATORS], 60)


FINDS_ITS_FUNCTION = """
import ray
from distrl.actors.cluster import connected
from distrl.config import Config, resolve

@ray.remote(num_cpus=0)
def reward():
    return resolve("my_rewards:brevity", "reward")()

with connected(Config()):
    print("found", ray.get(reward.remote()))
"""


@pytest.mark.slow
def test_actors_find_functions_in_the_working_directory(tmp_path: Path) -> None:
    """In a cluster of the run's own, whatever cluster the environment names."""
    (tmp_path / "my_rewards.py").write_text("def brevity():\n    return 17\n")
    ended = subprocess.run(
        [sys.executable, "-c", FINDS_ITS_FUNCTION],
        cwd=tmp_path,
        env=os.environ | {"RAY_ADDRESS": "http://127.0.0.1:1"},
        capture_output=True,
        text=True,
    )
    assert ended.stdout == "found 17\n", ended.stderr


GIVES_UP_ONCE = """
import types
import psutil
import ray
from ray._private import node, services
from distrl.actors.cluster import connected
from distrl.config import Config

clock, get_node, first = node.time, services.get_node, []
# Ray waits for 30 s, by this clock for half a second.
fast = {"monotonic": lambda: 60 * clock.monotonic(), "sleep": clock.sleep, "time": clock.time}
node.time = types.SimpleNamespace(**fast)

def not_the_first(gcs_address, node_id):
    first[:] = first or [gcs_address]
    if gcs_address == first[0]:
        raise RuntimeError("not there yet")
    return get_node(gcs_address, node_id)

services.get_node = not_the_first
with connected(Config()):
    there = [child.name() for child in psutil.Process().children()]
    print("raylets", there.count("raylet"), "found", ray.get(ray.remote(lambda: 17).remote()))
"""


@pytest.mark.slow
def test_a_node_that_ray_gives_up_is_begun_anew() -> None:
    """And nothing of the first one is left beside the second."""
    command = [sys.executable, "-c", GIVES_UP_ONCE]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout == "raylets 1 found 17\n", ended.stderr


@pytest.mark.parametrize(("why", "tries"), [("it timed out", 3), ("/tmp is full", 1)])
def test_a_node_that_does_not_start_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str, tries: int
) -> None:
    """Begun anew while there is time, where time was what it lacked."""
    tried = []

    def start(*_: Any) -> None:
        tried.append(why)
        if len(tried) == 3:
            monkeypatch.setattr("distrl.actors.cluster.time.monotonic", lambda: float("inf"))
        raise Exception(f"a node: {why}.")

    monkeypatch.setattr("distrl.actors.cluster._start_node", start)
    word = f"not start on this machine: a node: {why}. "
    with pytest.raises(PlacementError, match=word), connected(Config()):
        pytest.fail("started nothing")
    assert len(tried) == tries
    assert caplog.text.count("it is begun anew") == tries - 1
