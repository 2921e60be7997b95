"""PPO-ptx (Ouyang et al. 2022, eq. 2) against plain PPO on the demo's task: does it keep the text?

    python benchmarks/pretrain_mix.py [--from runs/demo] [--seeds 2] [--coef 0.6] [--price 0.04]

Both start from the finished SFT of --from, at equal samples; PPO-ptx adds the loss a token of
--sequences SFT examples to each optimizer step, --coef times. The mix holds the policy to the SFT
policy as the price of KL does, so PPO-ptx has a lower one, fixed (--price; the paper: 0.02 beside
27.8), and plain PPO the demo's. Then the loss on held-out reviews (nats a token of the test split;
that of the validation split is what --coef and --price were chosen by, on seed 0) under the SFT
policy and under what either run ended with. Writes runs/pretrain_mix.png. Thresholds, set before
the first run: PPO-ptx keeps the loss within 2 % of SFT's, plain PPO does not, and their rewards of
the last ten steps differ by 0.3 standard deviations of the SFT policy's scores at most.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, interval, metrics, ok, plot_rewards, report, spread, train_on

from distrl.config import Config, DataConfig, preset_path, read_yaml
from distrl.data.reviews import Split
from distrl.data.sources import load_demonstrations
from distrl.data.tokenizer import load_tokenizer
from distrl.learn.sft import encode, validation_loss
from distrl.models import load_policy

LAST = 10
KEPT = 0.02
COMPARABLE = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--coef", default="0.6")
    parser.add_argument("--sequences", default="128")
    parser.add_argument("--price", default="0.04")
    options = parser.parse_args()
    mix = [
        "--learn.pretrain.coef", options.coef, "--learn.pretrain.sequences", options.sequences,
        "--learn.kl.kind", "fixed", "--learn.kl.coef", options.price,
    ]  # fmt: skip
    label = f"ptx-{options.coef}-{options.sequences}-{options.price}"
    runs = {
        name: [
            train_on(
                options.source, steps=options.steps, staleness=0, seed=seed, label=of, words=words
            )
            for seed in range(options.seeds)
        ]
        for name, of, words in (("PPO", "staleness-0", []), ("PPO-ptx", label, mix))
    }
    rows = {name: [metrics(run) for run in those] for name, those in runs.items()}
    path = ROOT / "runs" / "pretrain_mix.png"
    plot_rewards(path, rows, f"gamma {options.coef}")
    figures: dict[str, Any] = {name: _summary(those) for name, those in rows.items()}
    risen = {split: _risen(options.source, runs, split) for split in ("validation", "test")}
    for split, of in risen.items():
        figures |= {f"{split} loss over SFT's, {name}": _percent(of[name]) for name in of}
    gaps = [
        _last(mixed, "reward/mean") - _last(plain, "reward/mean")
        for mixed, plain in zip(rows["PPO-ptx"], rows["PPO"], strict=True)
    ]
    comparable = abs(statistics.fmean(gaps)) <= COMPARABLE
    kept, lost = (statistics.fmean(risen["test"][name]) for name in ("PPO-ptx", "PPO"))
    figures |= {
        "PPO-ptx keeps the text": f"{ok(kept <= KEPT)} {kept:+.1%}",
        "plain PPO does not": f"{ok(lost > KEPT)} {lost:+.1%}",
        "reward, PPO-ptx - PPO": f"{ok(comparable)} {interval(gaps)}",
        "picture": path,
    }
    report(
        "PPO-ptx",
        figures,
        f"python benchmarks/pretrain_mix.py --steps {options.steps} --seeds {options.seeds} "
        f"--coef {options.coef} --sequences {options.sequences} --price {options.price}",
    )


def _risen(
    source: Path, runs: Mapping[str, Sequence[Path]], split: Split
) -> dict[str, list[float]]:
    """By how much of itself the SFT policy's loss on a split has risen, of each run."""
    before = _loss(source / "sft" / "policy", split)
    return {
        name: [_loss(run / "policy", split) / before - 1 for run in those]
        for name, those in runs.items()
    }


def _loss(policy: Path, split: Split) -> float:
    """Nats a token of the reviews of a split, as SFT measures it."""
    tokenizer = load_tokenizer(policy)
    rows = load_demonstrations(DataConfig(), split)
    demo = Config.model_validate(read_yaml(preset_path("demo")))
    examples, _ = encode(rows, tokenizer, demo.sft_tokens)
    return validation_loss(load_policy(policy, tokenizer=tokenizer), examples)


def _percent(values: Sequence[float]) -> str:
    """The mean, and each of them."""
    return f"{statistics.fmean(values):+.1%}  ({', '.join(f'{v:+.1%}' for v in values)})"


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.fmean(row[name] for row in rows[-LAST:])


def _summary(runs: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    text = ""
    if "loss/pretrain" in runs[0][-1]:
        text = f", SFT loss {spread([_last(rows, 'loss/pretrain') for rows in runs])}"
    return (
        f"reward {spread([_last(rows, 'reward/mean') for rows in runs])}, "
        f"KL {spread([_last(rows, 'kl/ref') for rows in runs])}, "
        f"length {spread([_last(rows, 'rollout/length_mean') for rows in runs])}{text}, "
        f"{runs[0][-1]['samples/total']:,} samples"
    )


if __name__ == "__main__":
    main()
