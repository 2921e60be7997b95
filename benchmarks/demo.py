"""The demo from nothing: does the policy get better, how long does it take, what does it need?

    python benchmarks/demo.py [--seed 0]

Thresholds, set before the first run: reward up by at least 1.5 standard deviations of the
SFT policy's scores at 12 nats of KL or less; the independent judge (VADER) up by at least
0.3; both intervals above zero; reward model right on 74 % of held-out pairs rated more than
0.5 apart and 81 % of those more than 2 apart; engine and learner within 1e-4 nats at lag 0
(mean over a step's tokens); no token older than the bound; at most 12 minutes and 8 GiB.
"""

from __future__ import annotations

import argparse
import json

from common import GIB, ROOT, distrl, memory_watch, metrics, mismatch, report, stopwatch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    name = f"benchmark-demo-{seed}"
    times: dict[str, float] = {}
    with memory_watch() as memory, stopwatch(times, "demo"):
        distrl("demo", "--fresh", "--run.name", name, "--run.seed", str(seed))
    run = ROOT / "runs" / name
    evaluation = json.loads((run / "evaluation.json").read_text())
    accuracy = json.loads((run / "reward-model" / "report.json").read_text())["held_out"][
        "accuracy"
    ]
    rows = metrics(run)
    bound = 1
    gain, kl = evaluation["gain"], evaluation["measures"]["kl"]["after"]
    judge = evaluation["measures"]["judge"]["change"]
    lag0, of = mismatch(rows)
    oldest = max(row["staleness/max"] for row in rows)
    checks = {
        "reward gain, SFT stds >= 1.5": (gain["value"] >= 1.5 and gain["low"] > 0, _ci(gain)),
        "KL, nats a response <= 12": (kl["value"] <= 12, _ci(kl)),
        "judge gain >= 0.3": (judge["value"] >= 0.3 and judge["low"] > 0, _ci(judge)),
        "RM accuracy, gap > 0.5 >= 74 %": (accuracy["0.5"]["value"] >= 0.74, _ci(accuracy["0.5"])),
        "RM accuracy, gap > 2 >= 81 %": (accuracy["2"]["value"] >= 0.81, _ci(accuracy["2"])),
        f"lag-0 mismatch ({of}) <= 1e-4": (lag0 <= 1e-4, f"{lag0:.1e}"),
        f"oldest token <= {bound} version": (oldest <= bound, f"{oldest:.0f}"),
        "minutes <= 12": (times["demo"] <= 720, f"{times['demo'] / 60:.1f}"),
        "memory, PSS GiB <= 8": (
            memory.peak_bytes <= 8 * GIB,
            f"{memory.peak_bytes / GIB:.2f}",
        ),
    }
    figures = {k: f"{'ok  ' if good else 'MISS'} {value}" for k, (good, value) in checks.items()}
    report("The demo", figures, f"python benchmarks/demo.py --seed {seed}")


def _ci(interval: dict[str, float]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


if __name__ == "__main__":
    main()
