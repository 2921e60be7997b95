"""DAPO's dynamic sampling on a reward of 0 or 1, where many groups have nothing to teach.

    python benchmarks/dynamic_sampling.py --from runs/demo [--steps 20] [--seeds 2]

The reward is 1 where VADER finds a continuation clearly positive (compound 0.5 or more), else 0.
Groups of four under DAPO's loss, with `driver.skip_without_signal` (a group of four equal rewards
is replaced by another prompt's before the learner sees it, and counted) and without. Both train on
the same number of samples; what the replaced groups cost stands beside them. Rewards are those of
all groups that were generated, replaced ones too, for what is trained on with it is never all
liked.

Thresholds: with it no trained batch holds a group of equal rewards, and the reward over the run is
at least that of the run without it. Changed after a first run with it, which did not end: the
reward was that of trained groups alone, and at 0.01 a nat nearly all was liked after 15 of 30
steps, so that no group was left to learn from.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from common import ROOT, interval, metrics, ok, plot_rewards, report, spread, total, train_on
from safetensors.torch import load_file

from distrl.driver.ledger_file import open_to_read

SAMPLES = 4
WORDS = [
    "--score.parts", json.dumps([{"name": "liked", "function": "rules:liked"}]),
    "--learn.advantage.kind", "group", "--no-learn.advantage.whiten",
    "--learn.objective.clip_high", "0.28", "--learn.kl.place", "loss",
    "--learn.kl.kind", "fixed", "--learn.kl.coef", "0.1",
    "--generate.samples_per_prompt", str(SAMPLES), "--learn.record", "true",
]  # fmt: skip
VARIANTS = {"with": ["--driver.skip_without_signal"], "without": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    runs: dict[str, list[Path]] = {name: [] for name in VARIANTS}
    for seed in range(options.seeds):
        for name, words in VARIANTS.items():
            runs[name].append(
                train_on(
                    options.source, steps=options.steps, seed=seed,
                    label=f"dynamic-{name}", words=[*WORDS, *words],
                )
            )  # fmt: skip
    rows = {name: [metrics(run) for run in those] for name, those in runs.items()}
    areas = {name: [_reward(run) for run in those] for name, those in runs.items()}
    ahead = [a - b for a, b in zip(areas["with"], areas["without"], strict=True)]
    silent = {name: [_silent(run) for run in those] for name, those in runs.items()}
    picture = ROOT / "runs" / "dynamic_sampling.png"
    curves = {name: [_rewards(run) for run in those] for name, those in runs.items()}
    plot_rewards(picture, curves, "all groups, dynamic sampling")
    report(
        "Dynamic sampling on a reward of 0 or 1",
        {
            **{f"{name}, reward of all groups": spread(of) for name, of in areas.items()},
            "with - without >= 0": f"{ok(statistics.fmean(ahead) >= 0)} {interval(ahead)}",
            **{
                f"{name}, reward of the last quarter": spread(
                    [_reward(run, after=0.75) for run in those]
                )
                for name, those in runs.items()
            },
            "with, trained groups of equal rewards = 0": f"{_ok(silent['with'])}",
            "without, share of such groups": spread(silent["without"]),
            "with, groups replaced": spread([of[-1]["driver/drops"] for of in rows["with"]]),
            **{
                f"{name}, seconds": spread([total(of, "time/step") for of in those])
                for name, those in rows.items()
            },
            "picture": str(picture),
        },
        f"python benchmarks/dynamic_sampling.py --steps {options.steps} --seeds {options.seeds}",
    )


def _ok(shares: list[float]) -> str:
    return f"{ok(max(shares) == 0)} {max(shares):.3f}"


def _rewards(run: Path) -> list[dict[str, float]]:
    """The run's rows, each with the mean reward of all groups up to its step's last one, beyond
    the step's before: replaced ones too."""
    with open_to_read(run / "ledger.sqlite") as db:
        lasts = dict(
            db.execute("SELECT step, max(idx) FROM trainings WHERE undone IS NULL GROUP BY step")
        )
        means = {
            step: db.execute(
                "SELECT avg(s.reward) FROM samples s JOIN attempts a ON a.idx = s.idx AND "
                "a.attempt = s.attempt WHERE a.undone IS NULL AND s.idx > ? AND s.idx <= ?",
                (lasts.get(step - 1, -1), last),
            ).fetchone()[0]
            for step, last in lasts.items()
        }
    return [{**row, "reward/mean": means[row["step"]]} for row in metrics(run)]


def _reward(run: Path, after: float = 0.0) -> float:
    """The mean of all samples that came after a share of the run's prompts."""
    with open_to_read(run / "ledger.sqlite") as db:
        (mean,) = db.execute(
            "SELECT avg(s.reward) FROM samples s JOIN attempts a ON a.idx = s.idx AND "
            "a.attempt = s.attempt WHERE a.undone IS NULL AND "
            "s.idx >= ? * (SELECT max(idx) FROM samples)",
            (after,),
        ).fetchone()
    return mean


def _silent(run: Path) -> float:
    """The share of trained groups whose rewards are all equal, by the run's recorded batches."""
    groups = [
        scores
        for batch in sorted((run / "recording").glob("step_*.safetensors"))
        for scores in load_file(batch)["scores_B"].reshape(-1, SAMPLES)
    ]
    return statistics.fmean(float(len(set(scores.tolist())) == 1) for scores in groups)


if __name__ == "__main__":
    main()
