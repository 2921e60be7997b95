"""Does the simulator foretell what a real run does? Samples/s, predicted over measured.

    python benchmarks/simulator_accuracy.py [--from runs/demo] [--steps 40]

Real runs of the demo's PPO stage (finished SFT and reward model of --from) at max_staleness 0, 1
and 4. Each is predicted twice: from the durations of that very run, and from those of the run at
max_staleness 1 alone. Threshold, set before the first run: within 15 %. Steps after the first two
count (warm-up), in the real runs and in the simulated ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import ROOT, metrics, ok, report, total, train_on

from distrl.checkpoint import RunDir
from distrl.cli.options import merged, validated
from distrl.config import read_yaml
from distrl.sim.fit import WARM_UP, fitted
from distrl.sim.simulate import simulate

BOUNDS = (0, 1, 4)
WITHIN = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    runs = {
        bound: train_on(options.source, steps=options.steps, staleness=bound) for bound in BOUNDS
    }
    figures = {}
    for bound, run in runs.items():
        rate = _rate(metrics(run)[WARM_UP:])
        own, other = _predicted(run, bound), _predicted(runs[1], bound)
        figures[f"max_staleness {bound}"] = (
            f"measured {rate:.1f} samples/s; from itself {_told(own / rate)}, "
            f"from max_staleness 1 {_told(other / rate)} of that"
        )
    report(
        "Simulator against real runs",
        figures,
        f"python benchmarks/simulator_accuracy.py --steps {options.steps}",
    )


def _told(ratio: float) -> str:
    """What was predicted over what was measured, against the threshold."""
    return f"{ok(abs(ratio - 1) <= WITHIN).strip()} {ratio:.2f}"


def _predicted(source: Path, bound: int) -> float:
    """Samples/s of a simulation with the durations of `source`."""
    directory = RunDir(source)
    config = validated(read_yaml(directory.config))
    model = fitted(directory.ledger, directory.metrics, config).model
    values = merged(config.model_dump(mode="json"), {"driver": {"max_staleness": bound}})
    config = validated(values).model_copy(update={"simulate": model})
    return _rate([row for _, row in simulate(config).rows][WARM_UP:])


def _rate(rows: list[dict[str, Any]]) -> float:
    per_step = rows[1]["samples/total"] - rows[0]["samples/total"]
    return per_step * len(rows) / total(rows, "time/step")


if __name__ == "__main__":
    main()
