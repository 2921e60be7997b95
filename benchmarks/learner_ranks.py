"""Two ranks of the learner against one: the same losses, and how much faster.

    python benchmarks/learner_ranks.py [--hidden 256] [--layers 4] [--rounds 5]

The PPO steps of `learner_efficiency.py`, by one process on one core, by two ranks of a core each
(FSDP2 over gloo), and by one process on both cores, each on the same batch from the same weights.
All are alive at once and work in turns. Threshold, set before the first run: losses of every step
equal to 1e-5. The speed is reported: a core more can at most double it.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from common import report
from learner_efficiency import make_batch, make_policy, make_spec

from distrl.learn.allocator import keep_freed_memory
from distrl.learn.learner import PolicyLearner
from distrl.learn.spec import Place

LOSSES = ("loss/policy", "value/loss", "kl/ref")
NORM = "grad/norm"
"""Told apart from the losses: torch's own float32 norm of the embedding's gradient, half a million
numbers, is 1.6e-5 off the one in float64."""


@dataclass(frozen=True)
class Team:
    """Processes that make one learner, and the ends of pipes to them."""

    ends: list[Connection]

    def step(self) -> tuple[float, dict[str, float]]:
        """Seconds and losses of a step."""
        began = time.perf_counter()
        for end in self.ends:
            end.send("step")
        losses = [end.recv() for end in self.ends]
        return time.perf_counter() - began, losses[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two cores are needed; the process may run on one")
    with tempfile.TemporaryDirectory(prefix="distrl-benchmark-") as folder:
        scratch = Path(folder)
        make_policy(scratch, options.hidden, options.layers)
        teams = {
            "one core": _team(scratch, [[cores[0]]]),
            "two ranks": _team(scratch, [[core] for core in cores]),
            "two threads": _team(scratch, [cores]),
        }
        rounds = [
            {name: team.step() for name, team in teams.items()} for _ in range(options.rounds + 1)
        ]
        for team in teams.values():
            for end in team.ends:
                end.send("end")
    report(
        "Ranks of the learner",
        _figures(rounds),
        f"python benchmarks/learner_ranks.py --hidden {options.hidden} --layers {options.layers} "
        f"--rounds {options.rounds}",
    )


def _team(scratch: Path, cores: list[list[int]]) -> Team:
    """One process for each list of cores."""
    address = f"127.0.0.1:{_free_port()}"
    ends: list[Connection] = []
    start = multiprocessing.get_context("spawn")
    for rank, mine in enumerate(cores):
        place = Place(rank=rank, world=len(cores), address=address) if len(cores) > 1 else None
        here, there = start.Pipe()
        start.Process(target=_rank, args=(there, scratch, mine, place), daemon=True).start()
        ends.append(here)
    for end in ends:
        end.recv()  # loaded
    return Team(ends)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(end: Connection, scratch: Path, cores: list[int], place: Place | None) -> None:
    """A process of a team: takes a step for each word that it is sent."""
    os.sched_setaffinity(0, cores)
    keep_freed_memory()
    torch.manual_seed(0)
    learner = PolicyLearner(replace(make_spec(scratch, threads=len(cores)), place=place))
    end.send({})
    while end.recv() == "step":
        metrics = learner.learn_from(make_batch(learner.version)).metrics
        end.send({name: metrics[name] for name in (*LOSSES, NORM)})
    learner.close()


def _apart(rounds: list[dict[str, tuple[float, dict[str, float]]]], names: Sequence[str]) -> float:
    """Largest difference of two ranks' figures from one core's, relative to those above 1."""
    return max(
        abs(turn["one core"][1][name] - turn["two ranks"][1][name])
        / max(1.0, abs(turn["one core"][1][name]))
        for turn in rounds
        for name in names
    )


def _figures(rounds: list[dict[str, tuple[float, dict[str, float]]]]) -> dict[str, Any]:
    timed = rounds[1:]  # what is allocated once is not timed
    seconds = {name: [turn[name][0] for turn in timed] for name in timed[0]}
    apart, norm = _apart(rounds, LOSSES), _apart(rounds, (NORM,))
    figures: dict[str, Any] = {
        "largest difference of a loss": f"{'ok  ' if apart <= 1e-5 else 'MISS'} {apart:.1e}",
        "largest difference of a gradient's norm": (
            f"{'ok  ' if norm <= 1e-5 else 'MISS'} {norm:.1e}"
        ),
    }
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(seconds["one core"], values, strict=True)]
        figures[name] = (
            f"{statistics.median(values):.2f} s a step, {statistics.median(ratios):.2f} of one "
            f"core's speed ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    assert all(map(math.isfinite, (apart, *seconds["one core"])))
    return figures


if __name__ == "__main__":
    main()
