"""Do the algorithms learn? The demo's task under each, at equal samples, from the same policy.

    python benchmarks/algorithms.py [--from runs/demo] [--steps 40] [--only grpo,rloo]

PPO, A2C and REINFORCE by a critic or its absence; GRPO, RLOO and DAPO by groups of four. Writes
runs/algorithms.png: reward against samples, a line an algorithm. The area under it is the mean
reward
over all samples. Thresholds, set before the first run: each raises the reward of the last ten steps
by one standard deviation of the SFT policy's scores at least (1.0, as rewards are normalised), and
PPO's area is larger than A2C's and REINFORCE's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, metrics, plot_rewards, report, train_on

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
    options = parser.parse_args()
    names = options.only.split(",")
    rows = {
        name: metrics(
            train_on(options.source, steps=options.steps, label=name, words=VARIANTS[name])
        )
        for name in names
    }
    path = ROOT / "runs" / "algorithms.png"
    plot_rewards(path, rows, "algorithm", _reward)
    figures: dict[str, Any] = {name: _summary(of) for name, of in rows.items()}
    if "ppo" in rows:
        for name in ("a2c", "reinforce"):
            if name in rows:
                ahead = _area(rows["ppo"]) - _area(rows[name])
                figures[f"area of PPO - {name}"] = f"{_ok(ahead > 0)} {ahead:+.2f}"
    figures["picture"] = path
    report("Algorithms", figures, f"python benchmarks/algorithms.py --steps {options.steps}")


def _ok(good: bool) -> str:
    return "ok  " if good else "MISS"


def _reward(row: Mapping[str, Any]) -> float:
    """The human reward alone, without penalties."""
    return row.get("reward/human", row["reward/mean"])


def _area(rows: Sequence[Mapping[str, Any]]) -> float:
    return statistics.fmean(_reward(row) for row in rows)


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    last = rows[-LAST:]
    reward = statistics.fmean(_reward(row) for row in last)
    gain = reward - _reward(rows[0])
    return (
        f"{_ok(gain >= 1)} reward {reward:.2f} ({gain:+.2f}), area {_area(rows):.2f}, "
        f"KL {statistics.fmean(row['kl/ref'] for row in last):.1f}, "
        f"length {statistics.fmean(row['rollout/length_mean'] for row in last):.1f}, "
        f"{rows[-1]['samples/total']:,} samples in {sum(row['time/step'] for row in rows):.0f} s, "
        f"{rows[-1]['driver/drops']:.0f} groups dropped"
    )


if __name__ == "__main__":
    main()
