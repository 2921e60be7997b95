"""A thousand generators on one core: real seconds of a simulated run, ledger and audit included.

    python benchmarks/simulator_scale.py [--generators 1000] [--steps 200] [--groups 1024]

Threshold, set before the first run: 60 s for the run with its ledger.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from common import report

from distrl.config import Config
from distrl.driver.audit import audit
from distrl.sim.simulate import simulate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--generators", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--groups", type=int, default=1024)
    options = parser.parse_args()
    config = Config.model_validate(
        {
            "generate": {"workers": options.generators, "samples_per_prompt": 2},
            "score": {"workers": 8},
            "driver": {"steps": options.steps, "prompts_per_step": options.groups},
            "simulate": {"learn_token_s": 1e-6},
        }
    )
    with tempfile.TemporaryDirectory(prefix="distrl-benchmark-") as folder:
        ledger, metrics = Path(folder) / "ledger.sqlite", Path(folder) / "metrics.jsonl"
        began = time.perf_counter()
        outcome = simulate(config, ledger)
        seconds = time.perf_counter() - began
        metrics.write_text("".join(f'{{"step": {step}}}\n' for step, _ in outcome.rows))
        began = time.perf_counter()
        holds = audit(ledger, metrics).holds
        audited = time.perf_counter() - began
        size = ledger.stat().st_size / 2**20
    groups = options.steps * options.groups
    report(
        "The simulator at scale",
        {
            "real seconds <= 60": f"{'ok  ' if seconds <= 60 else 'MISS'} {seconds:.1f}",
            "microseconds a group": f"{1e6 * seconds / groups:.0f}",
            "virtual seconds": f"{outcome.seconds:,.0f}",
            "ledger": f"{size:.0f} MiB, audited in {audited:.1f} s: "
            + ("holds" if holds else "BROKEN"),
        },
        f"python benchmarks/simulator_scale.py --generators {options.generators} "
        f"--steps {options.steps} --groups {options.groups}",
    )


if __name__ == "__main__":
    main()
