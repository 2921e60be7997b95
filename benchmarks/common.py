"""What the benchmarks share: a run as a subprocess, its memory, its figures."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from distrl.learn.allocator import from_the_start

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
COLOURS = 10
"""Lines that matplotlib tells apart by colour; what comes after them is dashed."""


def distrl(*words: str) -> None:
    """Run one distrl command, its output shown; it finds rewards by rule in `rules.py`. Raises
    CalledProcessError."""
    print("$ distrl", *words, flush=True)
    subprocess.run(
        [sys.executable, "-m", "distrl.cli", *words],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")},
    )


def train_on(
    source: Path,
    *,
    steps: int,
    staleness: int | str = 1,
    seed: int = 0,
    label: str | None = None,
    words: Sequence[str] = (),
) -> Path:
    """The demo's policy optimisation, with a core for the generator and one for the learner, from
    the finished stages of run `source`, with further `words`; the new run's directory, named by
    `label` (by its staleness where there is none).

    A run that has ended with the same words, from the same weights, serves again, for benchmarks
    share what they look at; remove its directory to have it done anew.
    """
    label = label or f"staleness-{staleness}"
    trained = json.dumps([{"name": "human", "model": str(source / "reward-model" / "model")}])
    parts = [] if "--score.parts" in words else ["--score.parts", trained]
    words = [
        "train", "--preset", "demo", "--fresh", "--run.seed", str(seed),
        "--model.path", str(source / "sft" / "policy"), "--sft.epochs", "0",
        "--learn.critic_lr", "6e-4",  # the demo's: the policy is as small as before
        *parts,
        "--driver.steps", str(steps), "--driver.max_staleness", str(staleness),
        "--driver.checkpoint_every", str(steps), "--learn.cpus", "1", "--no-metrics.wandb", *words,
    ]  # fmt: skip
    run = ROOT / "runs" / f"benchmark-{label}-{seed}"
    note = run / "benchmark.json"
    told = {"words": words, "start": fingerprint(source)}
    if note.exists() and json.loads(note.read_text()) == told:
        print(f"{run} is there: not run again", flush=True)
        return run
    note.unlink(missing_ok=True)  # or it would speak for a run that is cut short now
    distrl(*words, "--run.name", run.name)
    note.write_text(json.dumps(told))
    return run


def fingerprint(source: Path) -> str:
    """Of the weights in the finished stages of a run."""
    found = hashlib.sha256()
    for stage in ("sft/policy", "reward-model/model"):
        for file in sorted((source / stage).glob("*.safetensors")):
            found.update(file.read_bytes())
    return found.hexdigest()


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def apart(work: Callable[..., Any], *words: Any) -> Any:
    """`work(*words)` in a process of its own, with an actor's allocator; what it loads is not in
    this one."""
    spawn = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, from_the_start()), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(work, *words).result()


def total(rows: Sequence[dict[str, Any]], name: str) -> float:
    return sum(row[name] for row in rows)


def mismatch(rows: Sequence[dict[str, Any]]) -> tuple[float, str]:
    """Engine against learner on tokens of the learner's own version, nats: the largest of the
    steps' means, and of how many steps. With generation ahead of the learner few have such tokens.
    Raises KeyError where none has."""
    name = "mismatch/lag0_abs_mean"
    found = [row[name] for row in rows if name in row]
    if not found:
        raise KeyError(f"no row of the run has {name}; is it of an older distrl? Run it anew")
    return max(found), f"mean over a step's tokens, {len(found)} of {len(rows)} steps have any"


def plot_rewards(
    path: Path,
    runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    title: str,
    reward: Callable[[Mapping[str, Any]], float] = lambda row: row["reward/mean"],
) -> None:
    """Reward against samples, a line a name: the mean of its seeds, in a band from their lowest to
    their highest; `title` says what the names are of."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for place, (name, seeds) in enumerate(runs.items()):
        longest = max(seeds, key=len)
        samples = [row["samples/total"] for row in longest]
        style = "-" if place < COLOURS else "--"
        # A seed that ended early, as one that collapsed does, stays where it was.
        steps = [
            [reward(rows[min(step, len(rows) - 1)]) for rows in seeds]
            for step in range(len(longest))
        ]
        (line,) = axes.plot(samples, list(map(statistics.fmean, steps)), style, label=name)
        band = list(map(min, steps)), list(map(max, steps))
        axes.fill_between(samples, *band, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="samples", ylabel="reward")
    figure.legend(title=title, loc="outside right upper")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def machine() -> str:
    """What the figures were taken on."""
    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory().total / GIB
    return f"{platform.processor() or platform.machine()}, {cores} cores, {memory:.0f} GiB"


def spread(values: Sequence[float]) -> str:
    """The mean, and each of them."""
    return f"{statistics.fmean(values):.2f}  ({', '.join(f'{v:.2f}' for v in values)})"


def middle(values: Sequence[float], digits: int = 2) -> str:
    """The median, and how far from it they lie."""
    shown = (f"{v:,.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return "{} ({} to {})".format(*shown)


def interval(values: Sequence[float]) -> str:
    """The mean and its 95 % interval over seeds, by Student's t; of gaps between runs of one seed,
    that of their difference."""
    from scipy import stats

    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.2f} (one seed)"
    error = statistics.stdev(values) / len(values) ** 0.5
    half = error * float(stats.t.ppf(0.975, len(values) - 1))
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def ok(good: bool) -> str:
    """How a threshold was met."""
    return "ok  " if good else "MISS"


def report(title: str, figures: dict[str, Any], command: str) -> None:
    """Print the figures, and how to get them again."""
    print(f"\n{title}  ({machine()})")
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        print(f"  {name:<{width}}  {value}")
    print(f"  again: {command}", flush=True)


@dataclass
class Memory:
    """Peak of the proportional set size (PSS) summed over this process and all below it."""

    peak_bytes: int = 0


@contextlib.contextmanager
def memory_watch(every_s: float = 1.0) -> Iterator[Memory]:
    """Sample memory while the block runs. PSS shares out pages that several processes map."""
    memory, done = Memory(), threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            memory.peak_bytes = max(memory.peak_bytes, _pss(psutil.Process()))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()


def _pss(process: psutil.Process) -> int:
    size = 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error, OSError):
            size += one.memory_full_info().pss
    return size


@contextlib.contextmanager
def stopwatch(times: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    times[name] = time.monotonic() - began
