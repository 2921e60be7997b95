"""Does a run that goes on for hours need more and more memory?

    python benchmarks/memory_growth.py [--from runs/demo] [--steps 160]

The demo's policy optimisation from the finished stages of a run (`make demo` makes them), all of it
compiled: its responses are of any length, so hardly two passes are of one size, and what is kept
for each size would show. Memory is what a process has for itself (USS), asked for every second, and
is told at three points: after WARM_UP steps, in the middle and at the end; each is the median over
the twentieth of all steps before it.

Threshold, set before the first run: in the second half no process grows by more than a tenth. What
is kept for sizes is bounded, and fills up in the first.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from common import ROOT, ok, report, train_on

WARM_UP, EVERY_S, MOST = 10, 1.0, 0.10
LABEL = "memory-growth"
COMPILED = ("--learn.compile", "--score.compile", "--generate.compile")
PROCESSES = {
    "learner": "ray::LearnerActor",
    "scorer": "ray::ScorerActor",
    "generator": "ray::GeneratorActor",
    "engine": "VLLM::EngineCore",
    "driver": "distrl.cli train",
}
"""What a process of each kind is called."""

Sizes = dict[str, float]
"""MiB by process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--steps", type=int, default=160)
    options = parser.parse_args()
    if options.steps < 4 * WARM_UP:
        parser.error(f"--steps {options.steps}: at least {4 * WARM_UP}, or nothing is warmed up")
    run = ROOT / "runs" / f"benchmark-{LABEL}-0"
    for left in ("benchmark.json", "metrics.jsonl"):  # of a run before: this one is watched
        (run / left).unlink(missing_ok=True)
    by_step: dict[int, list[Sizes]] = {}
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(
            train_on, options.source.resolve(), steps=options.steps, label=LABEL, words=COMPILED
        )
        while not training.done():
            time.sleep(EVERY_S)
            by_step.setdefault(_steps(run / "metrics.jsonl"), []).append(dict(_sizes()))
        training.result()
    points = (WARM_UP, options.steps // 2, options.steps)
    figures = {}
    for name in PROCESSES:
        early, half, end = (_before(by_step, point, options.steps, name) for point in points)
        grown = end / half - 1
        figures[f"{name}, MiB at step {', '.join(map(str, points))}"] = (
            f"{ok(grown <= MOST)} {early:,.0f}, {half:,.0f}, {end:,.0f}: {grown:+.1%} at last"
        )
    report(
        "Memory over time", figures, f"python benchmarks/memory_growth.py --steps {options.steps}"
    )


def _steps(path: Path) -> int:
    """Learner steps that a run has written so far."""
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def _sizes() -> Iterator[tuple[str, float]]:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            words = " ".join(process.cmdline())
            for name, called in PROCESSES.items():
                if called in words:
                    yield name, process.memory_full_info().uss / 2**20


def _before(by_step: dict[int, list[Sizes]], point: int, steps: int, name: str) -> float:
    """Median of what process `name` had in the twentieth of all steps that ends with `point`."""
    near = range(point - max(steps // 20, 1), point)
    return statistics.median(
        sizes[name] for step in near for sizes in by_step.get(step, []) if name in sizes
    )


if __name__ == "__main__":
    main()
