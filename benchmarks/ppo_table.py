"""PPO's table of surrogates (Schulman et al. 2017, table 1) in kind, on the demo's task.

    python benchmarks/ppo_table.py [--from runs/demo] [--steps 20] [--seeds 1] [--only none,fixed-1]

Clipping, the KL penalty between successive policies (at an adaptive price and at fixed ones), and
neither of them (bounds of the clip that never bind). Ten epochs a batch as in the paper, four
minibatches an epoch, so forty updates on 128 responses of 24 tokens, at a learning rate at which
what is not held back goes 0.2 nats a token and more in a step. All else is equal: seed, samples,
and the leash to the SFT policy, at the price that the demo sets out with. Targets and prices of the
penalty are the paper's, in nats a token; an adaptive price starts at 1.

That price decides. Without a bound a policy gets more reward, further from the SFT policy: at half
the price, in trials before the first whole table, its area was 0.41 where that of clip 0.2 was 0.34
(at a learning rate of 3e-4, 0.05 and 0.11).

An arm's area is the mean over all samples of what it maximises: reward less the leash's price. The
score moves and scales it as in the paper: 0 is the policy that all start from, 1 the best arm. An
arm that stops for steps that are not finite keeps its last figures to the end. Writes
runs/ppo_table.png. Thresholds, set before the first run: clip 0.2 has at least the area of the best
adaptive price, that one at least the area of the worst fixed price, and no bound at all has the
smallest area.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, metrics, plot_rewards, report, train_on
from scipy import stats

LAST = 3
PRICE = 0.2
SETTING = [
    "--driver.prompts_per_step", "32", "--generate.max_new_tokens", "24", "--learn.epochs", "10",
    "--learn.lr", "1e-4", "--learn.critic_lr", "1e-4", "--learn.compile",
    "--learn.kl.kind", "fixed", "--learn.kl.coef", str(PRICE),
]  # fmt: skip
PENALTY = ["--learn.objective.kind", "kl_penalty"]
TARGETS = ("0.003", "0.01", "0.03")
PRICES = ("0.3", "1", "3", "10")


def _clip(low: str, high: str) -> list[str]:
    return ["--learn.objective.clip_low", low, "--learn.objective.clip_high", high]


ADAPTIVE = {
    f"adaptive-{target}": [*PENALTY, "--learn.objective.penalty_target", target]
    for target in TARGETS
}
FIXED = {f"fixed-{price}": [*PENALTY, "--learn.objective.penalty", price] for price in PRICES}
ARMS: dict[str, list[str]] = {
    "none": _clip("1", "1e9"),
    **{f"clip-{bound}": _clip(bound, bound) for bound in ("0.1", "0.2", "0.3")},
    **ADAPTIVE,
    **FIXED,
}

Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default=",".join(ARMS))
    options = parser.parse_args()
    names = options.only.split(",")
    runs = {
        name: [_rows(options.source, options.steps, seed, name) for seed in range(options.seeds)]
        for name in names
    }
    areas = {
        name: [_area(rows, options.steps, _return) for rows in of] for name, of in runs.items()
    }
    path = ROOT / "runs" / "ppo_table.png"
    plot_rewards(path, runs, "less the leash's price", _return)
    scores = _scores(areas, [_return(of[0]) for of in runs[names[0]]])
    figures: dict[str, Any] = {
        name: _summary(runs[name], areas[name], scores[name], options.steps) for name in names
    }
    figures |= _checks(areas, runs)
    figures["picture"] = path
    report(
        "PPO's table 1",
        figures,
        f"python benchmarks/ppo_table.py --steps {options.steps} --seeds {options.seeds} "
        f"--only {options.only}",
    )


def _rows(source: Path, steps: int, seed: int, name: str) -> Rows:
    """An arm's rows; those up to its collapse where the learner stopped it."""
    label = f"table-{name}"
    try:
        words = [*SETTING, *ARMS[name]]
        return metrics(
            train_on(source, steps=steps, staleness=0, seed=seed, label=label, words=words)
        )
    except subprocess.CalledProcessError:
        rows = metrics(ROOT / "runs" / f"benchmark-{label}-{seed}")
        if not rows or not rows[-1].get("learn/skipped_steps"):
            raise  # something else than steps that were not finite
        return rows


def _reward(row: Mapping[str, Any]) -> float:
    return row["reward/human"]


def _return(row: Mapping[str, Any]) -> float:
    """What every arm maximises: the reward less the price of having left the SFT policy."""
    return _reward(row) - PRICE * row["kl/ref"]


def _area(rows: Rows, steps: int, of: Callable[[Mapping[str, Any]], float]) -> float:
    """Mean over `steps`; what is missing counts as the last row. Steps are of one size."""
    values = [of(row) for row in rows]
    return statistics.fmean(values + values[-1:] * (steps - len(rows)))


def _scores(areas: Mapping[str, Sequence[float]], starts: Sequence[float]) -> dict[str, float]:
    """As in the paper: 0 is the policy at the start, 1 the best arm; the mean over seeds. NaN where
    no arm gains anything."""
    gains = [
        max(of) - start for of, start in zip(zip(*areas.values(), strict=True), starts, strict=True)
    ]
    if min(gains) <= 0:
        return dict.fromkeys(areas, math.nan)
    return {
        name: statistics.fmean((a - s) / g for a, s, g in zip(of, starts, gains, strict=True))
        for name, of in areas.items()
    }


def _summary(runs: Sequence[Rows], areas: Sequence[float], score: float, steps: int) -> str:
    ends = [row for rows in runs for row in rows[-LAST:]]

    def mean(name: str) -> float:
        return statistics.fmean(row.get(name, 0.0) for row in ends)

    rewards = [_area(rows, steps, _reward) for rows in runs]
    return (
        f"score {score:+.2f}, area {_spread(areas)}, of the reward alone {_spread(rewards)}; last "
        f"{LAST} steps: reward {mean('reward/human'):.2f}, KL {mean('kl/ref'):.1f}, "
        f"moved {mean('ppo/approx_kl'):.3g} nats a token, entropy {mean('ppo/entropy'):.1f}, "
        f"length {mean('rollout/length_mean'):.1f}{_stopped(runs, steps)}"
    )


def _stopped(runs: Sequence[Rows], steps: int) -> str:
    early = [str(len(rows)) for rows in runs if len(rows) < steps]
    return f", stopped after step {', '.join(early)}" if early else ""


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{v:.2f}' for v in values)})"


def _checks(
    areas: Mapping[str, Sequence[float]], runs: Mapping[str, Sequence[Rows]]
) -> dict[str, str]:
    """The thresholds, as far as the arms that they compare were run."""
    by_area = sorted(areas, key=lambda name: statistics.fmean(areas[name]))
    adaptive = next((name for name in reversed(by_area) if name in ADAPTIVE), None)
    fixed = next((name for name in by_area if name in FIXED), None)
    others = next((name for name in by_area if name != "none"), None)
    pairs = [("clip-0.2", adaptive), (adaptive, fixed), (others, "none")]
    return {
        f"{better} over {worse}": _ahead(areas, runs, better, worse)
        for better, worse in pairs
        if better in areas and worse in areas
    }


def _ahead(
    areas: Mapping[str, Sequence[float]],
    runs: Mapping[str, Sequence[Rows]],
    better: str,
    worse: str,
) -> str:
    """The difference of areas and its 95 % interval."""
    gaps = [b - w for b, w in zip(areas[better], areas[worse], strict=True)]
    mean = statistics.fmean(gaps)
    if len(gaps) > 1:  # of pairs with the same seed, by Student's t
        error = statistics.stdev(gaps) / len(gaps) ** 0.5
        half, source = error * float(stats.t.ppf(0.975, len(gaps) - 1)), "seeds"
    else:
        half, source = 1.96 * math.hypot(*(_error(runs[n][0]) for n in (better, worse))), "samples"
    noise = ", within noise" if abs(mean) < half else ""
    interval = f"[{mean - half:+.2f}, {mean + half:+.2f}]"
    return f"{'ok  ' if mean >= 0 else 'MISS'} {mean:+.2f} {interval} by {source}{noise}"


def _error(rows: Rows) -> float:
    """Standard error of a run's mean reward, were its samples independent: the least that a single
    seed leaves open."""
    samples = rows[-1]["samples/total"]
    return math.sqrt(statistics.fmean(row["reward/std"] ** 2 for row in rows) / samples)


if __name__ == "__main__":
    main()
