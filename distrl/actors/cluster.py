"""A Ray cluster, here or there, and a place on it for every role."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants
from ray.exceptions import AuthenticationError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from distrl.actors.process import end_tree
from distrl.config import Config
from distrl.errors import UserError
from distrl.generate.engine import SOCKETS

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 256 * 2**20
"""Local clusters: rollouts are small and short-lived."""

QUIET_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # An engine's shared memory is freed by the resource tracker that Python starts beside an
    # actor; Ray would kill it together with the actor, by parent and by process group. Engines
    # see to their own end.
    "RAY_kill_child_processes_on_worker_exit": "0",
    "RAY_process_group_cleanup_enabled": "0",
}
"""Ray's settings for a local cluster, unless the environment has its own."""


SESSION: dict[str, Any] = {
    "namespace": "distrl",
    "log_to_driver": False,
    "logging_level": logging.ERROR,
}
"""Actors write logs of their own; Ray's would only be in the way of the progress."""


SCRATCH = "distrl-ray-"
"""A local cluster's folder among temporary files: this, the driver's pid, something random."""

TOKEN = (
    "export RAY_AUTH_MODE=token in this shell, and have the head's ~/.ray/auth_token here, or "
    "RAY_AUTH_TOKEN_PATH name a copy of it"
)
"""What lets a process into a cluster that asks for a token."""

SLOW = re.compile("timed out", re.IGNORECASE)
"""What Ray says where a node did not come up in time."""

KNOCK_TIMEOUT_S = 10
"""A head node that is there answers within this time."""


class PlacementError(UserError):
    """The cluster cannot hold a role; the message says what is missing and where."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What one role asks of the cluster: `workers` bundles of so many CPUs and GPUs."""

    role: str
    workers: int
    cpus: float
    gpus: float

    @property
    def bundle(self) -> dict[str, float]:
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        return {k: v for k, v in wanted.items() if v} or {"CPU": 0.01}


def demands(config: Config) -> list[Demand]:
    """The roles of a training run, the one that is hardest to place first."""
    generate, score, learn = config.generate, config.score, config.learn
    return [
        Demand(role="learner", workers=learn.ranks, cpus=learn.cpus, gpus=learn.gpus),
        Demand(role="generator", workers=generate.workers, cpus=generate.cpus, gpus=generate.gpus),
        Demand(role="scorer", workers=score.workers, cpus=score.cpus, gpus=score.gpus),
    ]


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """Within it Ray is there: the cluster at `cluster.address`, or one made for this run.

    A local cluster is given as many logical CPUs as the roles ask for: on a laptop they
    share the real cores. It ends with the block, and with this process; so do its files.
    """
    os.environ |= QUIET_RAY | {k: v for k, v in os.environ.items() if k in QUIET_RAY}
    _sweep()
    prefix = f"{SCRATCH}{os.getpid()}-"
    # Ray may still write its last log lines while its folder is removed.
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as scratch:
        if config.cluster.address is None:
            _start_here(config, scratch)
        else:
            _join(config.cluster.address)
        try:
            yield
        finally:
            ray.shutdown()


def _sweep() -> None:
    """Remove the folders of runs and engines that were killed before they could."""
    for prefix in (SCRATCH, SOCKETS):
        for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
            pid = folder.name.removeprefix(prefix).split("-")[0]
            if pid.isdigit() and not Path("/proc", pid).exists():
                shutil.rmtree(folder, ignore_errors=True)


def _start_here(config: Config, scratch: str) -> None:
    """Start a cluster for this run. Ray gives a node 30 s to come up and no setting for it, which a
    busy machine may not keep: it is begun anew for as long as an actor may take."""
    deadline = time.monotonic() + config.generate.start_timeout_s
    while True:
        try:
            return _start_node(config, scratch)
        except Exception as error:  # Ray's word for it has no class of its own
            _end_node(scratch)
            if time.monotonic() > deadline or not SLOW.search(str(error)):
                raise PlacementError(
                    f"Ray did not start on this machine: {error} Its logs are gone with it; "
                    "'ray start --head --block' shows them. A machine that is busy with something "
                    "else may be too slow, and a full one ('free', 'df /dev/shm /tmp') lets none in"
                ) from error
            log.warning("Ray did not come up in its time on this busy machine; it is begun anew")


def _end_node(scratch: str) -> None:
    """Kill what was started of a node: Ray's processes have the folder in their command."""
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if scratch in " ".join(process.cmdline()):
                end_tree(process)


def _start_node(config: Config, scratch: str) -> None:
    cpus = sum(d.workers * d.cpus for d in demands(config))
    with _loopback_only():
        ray.init(
            "local",  # whatever RAY_ADDRESS names: only `cluster.address` joins a cluster
            num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES + int(config.driver.buffer_mib * 2**20),
            _temp_dir=scratch,
            **SESSION,
        )


@contextmanager
def _loopback_only() -> Iterator[None]:
    """A cluster started within it listens on the loopback address alone, as Ray has it on a Mac and
    on Windows (for their firewalls' sake): by a variable for the processes that it starts, and by
    what this process read of that variable when it imported Ray."""
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        os.environ.pop(name)
        if before[0] is not None:
            os.environ[name] = before[0]
        ray_constants.ENABLE_RAY_CLUSTER = before[1]


def _join(address: str) -> None:
    """Join the cluster at `address`; with "auto" the one that RAY_ADDRESS names, as Ray has it, or
    else the one that was started on this machine."""
    asked = f"cluster.address={address!r}"
    if address == "auto" and (address := os.environ.get("RAY_ADDRESS") or "auto") != "auto":
        asked += f", which is RAY_ADDRESS={address!r} of this shell,"
    try:
        if address != "auto":
            _knock(address, asked)
        ray.init(address=address, **SESSION)
    except AuthenticationError as error:
        raise PlacementError(
            f"the Ray cluster at {asked} did not let this process in: {error} "
            f"{TOKEN} (see cluster/README.md)"
        ) from error
    except (OSError, RuntimeError) as error:
        raise PlacementError(
            f"no Ray cluster answers at {asked}: {error}. "
            f"Start one with 'ray start --head'; if it is there, it may ask for another token: "
            f"{TOKEN} (see cluster/README.md)"
        ) from error


def _knock(address: str, asked: str) -> None:
    """Raise OSError where nobody listens: Ray itself would go on trying for many minutes."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()) or "/" in host:
        raise PlacementError(f"{asked} should be the head's host:port, or 'auto'")
    socket.create_connection((host, int(port)), KNOCK_TIMEOUT_S).close()


def check_demands(wanted: list[Demand], nodes: list[dict[str, float]]) -> None:
    """Raise PlacementError where a bundle fits no machine, or all of them not the cluster.

    nodes: the resources of each machine, {"CPU": .., "GPU": ..}.
    """
    for demand in wanted:
        if not any(_fits(demand.bundle, node) for node in nodes):
            raise PlacementError(
                f"no machine of the cluster can hold a {demand.role}, which asks for "
                f"{_words(demand.bundle)}; the machines have: "
                f"{'; '.join(_words(node) for node in nodes) or 'nothing'}. "
                f"Lower {_section(demand)}.cpus or {_section(demand)}.gpus, or add a machine"
            )
    for kind in ("CPU", "GPU"):
        there = sum(node.get(kind, 0) for node in nodes)
        if asked := _too_much(wanted, kind, there):
            raise PlacementError(
                f"{asked} and the cluster has {there:g}; use fewer workers or add a machine"
            )


def check_local_gpus(wanted: list[Demand]) -> None:
    """Raise PlacementError where this machine has fewer GPUs than a cluster on it would need. The
    logical CPUs are as many as are asked for."""
    if not any(demand.gpus for demand in wanted):
        return
    import torch

    there = torch.cuda.device_count()
    if asked := _too_much(wanted, "GPU", there):
        raise PlacementError(
            f"{asked}, and this machine has {there}; lower "
            f"{' or '.join(f'{_section(d)}.gpus' for d in wanted if d.gpus)}, or name a cluster by "
            "cluster.address"
        )


def _too_much(wanted: list[Demand], kind: str, there: float) -> str | None:
    """In words, what is asked for of "CPU" or "GPU", where that is more than is there."""
    asking = [demand for demand in wanted if kind in demand.bundle]
    need = sum(d.workers * d.bundle[kind] for d in asking)
    if need <= there:
        return None
    parts = ", ".join(f"{d.workers} {d.role}(s) x {d.bundle[kind]:g}" for d in asking)
    return f"the run needs {need:g} {kind}s ({parts})"


def place(wanted: list[Demand], timeout_s: float) -> dict[str, PlacementGroup]:
    """Reserve a placement group for each role; all or nothing. Raises PlacementError."""
    check_demands(wanted, [_resources(node) for node in ray.nodes() if node["Alive"]])
    groups: dict[str, PlacementGroup] = {}
    for demand in wanted:
        group = placement_group([demand.bundle] * demand.workers, strategy="PACK")
        groups[demand.role] = group
        if not group.wait(timeout_s):
            release(groups)
            raise PlacementError(
                f"the {demand.workers} {demand.role}(s) found no place within "
                f"cluster.placement_timeout_s={timeout_s:g}: each asks for "
                f"{_words(demand.bundle)}, and free is {_words(dict(ray.available_resources()))}. "
                "Somebody else may hold the rest: 'ray status' tells"
            )
    return groups


def release(groups: dict[str, PlacementGroup]) -> None:
    """Give all reservations back."""
    for group in groups.values():
        remove_placement_group(group)


def _resources(node: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in node["Resources"].items() if k in ("CPU", "GPU")}


def _fits(bundle: dict[str, float], node: dict[str, float]) -> bool:
    return all(node.get(kind, 0) >= amount for kind, amount in bundle.items())


def _section(demand: Demand) -> str:
    return {"learner": "learn", "generator": "generate", "scorer": "score"}[demand.role]


def _words(resources: dict[str, float]) -> str:
    shown = {k: v for k, v in resources.items() if k in ("CPU", "GPU")}
    return ", ".join(f"{v:g} {k}" for k, v in shown.items()) or "no CPU"
