"""Do the algorithms learn? The demo's task under each, at equal samples, from the same policy.

    python benchmarks/algorithms.py [--from runs/demo] [--steps 40] [--seeds 1] [--only grpo,rloo]

PPO, A2C and REINFORCE by a critic or its absence; GRPO, RLOO and DAPO by groups of four. Writes
runs/algorithms.png: reward against samples, a line an algorithm with its seeds' range. The area
under a run's own is its mean reward over all samples. Thresholds, set before the first run: each
raises the reward of the last ten steps by one standard deviation of the SFT policy's scores at
least (1.0, as rewards are normalised), and PPO's area is larger than A2C's and REINFORCE's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, interval, metrics, ok, plot_rewards, report, spread, train_on

LAST = 10

ONE_STEP = ["--learn.minibatches", "1", "--learn.objective.kind", "policy_gradient"]
GROUP = ["--learn.advantage.kind", "group", "--no-learn.advantage.whiten"]
VARIANTS: dict[str, list[str]] = {
    "ppo": [],
    "a2c": [*ONE_STEP, "--learn.advantage.lam", "1"],
    "reinforce": [*ONE_STEP, "--learn.advantage.kind", "returns"],
    "grpo": [*GROUP, "--learn.objective.aggregate", "sequence", "--learn.kl.place", "loss"],
    "rloo": [
        *GROUP, "--learn.advantage.baseline", "leave_one_out", "--learn.advantage.scale", "none",
        "--learn.objective.kind", "policy_gradient",
    ],
    "dapo": [
        *GROUP, "--learn.objective.clip_high", "0.28", "--driver.skip_without_signal",
        "--learn.kl.place", "loss",
        "--score.overlong.penalty", "1", "--score.overlong.start", "32",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    runs = {
        name: [
            metrics(
                train_on(
                    options.source, steps=options.steps, seed=seed, label=name, words=VARIANTS[name]
                )
            )
            for seed in range(options.seeds)
        ]
        for name in options.only.split(",")
    }
    path = ROOT / "runs" / "algorithms.png"
    plot_rewards(path, runs, "algorithm", _reward)
    figures: dict[str, Any] = {name: _summary(those) for name, those in runs.items()}
    areas = {name: [_area(rows) for rows in those] for name, those in runs.items()}
    for name in ("a2c", "reinforce"):
        if "ppo" in areas and name in areas:
            ahead = [ppo - other for ppo, other in zip(areas["ppo"], areas[name], strict=True)]
            good = statistics.fmean(ahead) > 0
            figures[f"area of PPO - {name}"] = f"{ok(good)} {interval(ahead)}"
    figures["picture"] = path
    report(
        "Algorithms",
        figures,
        f"python benchmarks/algorithms.py --steps {options.steps} --seeds {options.seeds} "
        f"--only {options.only}",
    )


def _reward(row: Mapping[str, Any]) -> float:
    """The human reward alone, without penalties."""
    return row.get("reward/human", row["reward/mean"])


def _area(rows: Sequence[Mapping[str, Any]]) -> float:
    return statistics.fmean(_reward(row) for row in rows)


def _summary(runs: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """The gain is over the first step of each seed."""
    last = [row for rows in runs for row in rows[-LAST:]]
    ends = [statistics.fmean(map(_reward, rows[-LAST:])) for rows in runs]
    gains = [end - _reward(rows[0]) for end, rows in zip(ends, runs, strict=True)]
    return (
        f"{ok(statistics.fmean(gains) >= 1)} reward {spread(ends)}, gain {interval(gains)}, "
        f"area {spread([_area(rows) for rows in runs])}, "
        f"KL {statistics.fmean(row['kl/ref'] for row in last):.1f}, "
        f"length {statistics.fmean(row['rollout/length_mean'] for row in last):.1f}, "
        f"{sum(rows[-1]['driver/drops'] for rows in runs):.0f} groups dropped"
    )


if __name__ == "__main__":
    main()
