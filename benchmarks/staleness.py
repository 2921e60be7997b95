"""What staleness costs on the demo: KL and ESS by the age of tokens, reward against samples.

    python benchmarks/staleness.py [--from runs/demo] [--steps 40] [--bounds 0,1,2,4,8,auto]

PPO of the demo (finished SFT and reward model of --from) at each bound, all else equal. Writes
runs/staleness.png: reward against samples, a line a bound. For bounds of 4 and more it prints
what each age of tokens was like, and for auto where the bound settled and the ESS there.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, metrics, plot_rewards, report, train_on

LAST = 10
AGES_FROM = 4
OF_AGE = "offpolicy/tokens/lag"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--bounds", default="0,1,2,4,8,auto")
    options = parser.parse_args()
    bounds = options.bounds.split(",")
    rows = {
        bound: metrics(train_on(options.source, steps=options.steps, staleness=bound))
        for bound in bounds
    }
    path = ROOT / "runs" / "staleness.png"
    plot_rewards(path, {bound: [of] for bound, of in rows.items()}, "max_staleness")
    figures: dict[str, Any] = {f"bound {bound}": _summary(of) for bound, of in rows.items()}
    for bound in bounds:
        if bound != "auto" and int(bound) >= AGES_FROM:
            figures |= {f"bound {bound}, {lag}": v for lag, v in _by_lag(rows[bound]).items()}
    figures["picture"] = path
    report(
        "Staleness",
        figures,
        f"python benchmarks/staleness.py --steps {options.steps} --bounds {options.bounds}",
    )


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    last = rows[-LAST:]

    def mean(name: str) -> float:
        return statistics.fmean(row[name] for row in last)

    return (
        f"reward {mean('reward/mean'):.2f}, KL {mean('kl/ref'):.1f}, ESS {mean('ppo/ess'):.3f}, "
        f"bound {last[-1]['staleness/bound']}, {rows[-1]['samples/total']:,} samples in "
        f"{sum(row['time/step'] for row in rows):.0f} s"
    )


def _by_lag(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """KL and ESS by age: token-weighted means over the run."""
    lags = sorted({int(n.rpartition("lag")[2]) for r in rows for n in r if n.startswith(OF_AGE)})
    return {f"lag {lag}": _at_lag(rows, lag) for lag in lags}


def _at_lag(rows: Sequence[Mapping[str, Any]], lag: int) -> str:
    having = [row for row in rows if f"offpolicy/tokens/lag{lag}" in row]
    tokens = sum(row[f"offpolicy/tokens/lag{lag}"] for row in having)

    def mean(name: str) -> float:
        key = f"offpolicy/{name}/lag{lag}"
        return sum(row[key] * row[f"offpolicy/tokens/lag{lag}"] for row in having) / tokens

    return (
        f"{tokens:,.0f} tokens, KL {mean('kl'):.2e}, ESS {mean('ess'):.3f}, "
        f"ratio {mean('ratio_mean'):.3f}, outside the clip {mean('clip_fraction'):.3f}"
    )


if __name__ == "__main__":
    main()
