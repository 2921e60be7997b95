"""Wall-clock of synchronous over asynchronous training: same samples, same steps, same cores.

    python benchmarks/async_vs_sync.py [--from runs/demo] [--steps 40] [--seeds 3]

The generator has one core and the learner another in both modes; only `max_staleness`
differs (0 and 1). The limit: were generation and learning to overlap perfectly, a run would
last as long as the slower of the two alone does in the synchronous run. Times are of steps
after the first two (warm-up); runs alternate, so that noise of the machine hits both.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from common import ROOT, interval, metrics, report, spread, total, train_on

WARM_UP = 2
LAST = 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--from", dest="source", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    ratios, limits, sync_rewards, async_rewards = [], [], [], []
    for seed in range(options.seeds):
        sync = _run(options.source, options.steps, seed, staleness=0)
        overlapped = _run(options.source, options.steps, seed, staleness=1)
        wall = total(sync, "time/step")
        learner = total(sync, "time/learn") + total(sync, "time/sync")
        slower = max(learner, wall - learner)
        ratios.append(wall / total(overlapped, "time/step"))
        limits.append(wall / slower)
        sync_rewards.append(_final_reward(sync))
        async_rewards.append(_final_reward(overlapped))
    report(
        "Synchronous over asynchronous",
        {
            "wall-clock ratio sync/async": spread(ratios),
            "limit (slower side alone)": spread(limits),
            "final reward, sync": spread(sync_rewards),
            "final reward, async": spread(async_rewards),
            "sync - async, 95 % interval": interval(
                [a - b for a, b in zip(sync_rewards, async_rewards, strict=True)]
            ),
        },
        f"python benchmarks/async_vs_sync.py --steps {options.steps} --seeds {options.seeds}",
    )


def _run(source: Path, steps: int, seed: int, *, staleness: int) -> list[dict[str, float]]:
    """One training run from the finished stages of `source`; its rows after the warm-up. Times are
    compared, so it shares no run with other benchmarks, which may be of another day."""
    label = f"async-vs-sync-{staleness}"
    run = train_on(source, steps=steps, staleness=staleness, seed=seed, label=label)
    return metrics(run)[WARM_UP:]


def _final_reward(rows: list[dict[str, float]]) -> float:
    return statistics.fmean(row["reward/mean"] for row in rows[-LAST:])


if __name__ == "__main__":
    main()
