"""PPO-ptx (Ouyang et al. 2022, eq. 2) against plain PPO on the demo's task: does it keep the text?

    python benchmarks/pretrain_mix.py [--from runs/demo] [--steps 40] [--coef 0.1] [--sequences 32]

Both start from the finished SFT of --from, at equal samples; PPO-ptx adds the loss a token of SFT
examples to each optimizer step, --coef times. Then the loss on held-out reviews (nats a token of
the test split; that of the validation split is what --coef was chosen by) under the SFT policy and
under what either run ended with. Writes runs/pretrain_mix.png. Thresholds, set before the first
run: PPO-ptx keeps the loss within 2 % of SFT's, plain PPO does not, and their rewards of the last
ten steps differ by 0.3 standard deviations of the SFT policy's scores at most.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, metrics, plot_rewards, report, train_on

from distrl.config import Config, DataConfig, preset_path, read_yaml
from distrl.data.reviews import Split
from distrl.data.sources import load_demonstrations
from distrl.data.tokenizer import load_tokenizer
from distrl.learn.sft import encode, validation_loss
from distrl.models import load_policy

LAST = 10
KEPT = 1.02
COMPARABLE = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--coef", default="0.1")
    parser.add_argument("--sequences", default="32")
    options = parser.parse_args()
    mix = ["--learn.pretrain.coef", options.coef, "--learn.pretrain.sequences", options.sequences]
    runs = {
        name: train_on(options.source, steps=options.steps, staleness=0, label=label, words=words)
        for name, label, words in (
            ("PPO", "staleness-0", []),
            ("PPO-ptx", f"ptx-{options.coef}-{options.sequences}", mix),
        )
    }
    rows = {name: metrics(run) for name, run in runs.items()}
    policies = {"SFT": options.source / "sft" / "policy"}
    policies |= {name: run / "policy" for name, run in runs.items()}
    path = ROOT / "runs" / "pretrain_mix.png"
    plot_rewards(path, rows, f"gamma {options.coef}")
    figures: dict[str, Any] = {name: _summary(of) for name, of in rows.items()}
    validation, test = (_losses(policies, split) for split in ("validation", "test"))
    figures |= {f"validation loss, {name}": text for name, text in _shown(validation).items()}
    figures |= {f"test loss, {name}": text for name, text in _shown(test).items()}
    report(
        "PPO-ptx",
        figures | _checks(test, rows) | {"picture": path},
        f"python benchmarks/pretrain_mix.py --steps {options.steps} --coef {options.coef} "
        f"--sequences {options.sequences}",
    )


def _losses(policies: Mapping[str, Path], split: Split) -> dict[str, float]:
    return {name: _loss(policy, split) for name, policy in policies.items()}


def _loss(policy: Path, split: Split) -> float:
    """Nats a token of the reviews of a split, as SFT measures it."""
    tokenizer = load_tokenizer(policy)
    rows = load_demonstrations(DataConfig(), split)
    demo = Config.model_validate(read_yaml(preset_path("demo")))
    examples, _ = encode(rows, tokenizer, demo.sft_tokens)
    return validation_loss(load_policy(policy, tokenizer=tokenizer), examples)


def _shown(losses: Mapping[str, float]) -> dict[str, str]:
    sft = losses["SFT"]
    return {name: f"{loss:.3f} ({loss / sft - 1:+.1%})" for name, loss in losses.items()}


def _checks(
    losses: Mapping[str, float], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, str]:
    plain, mixed = (losses[name] / losses["SFT"] for name in ("PPO", "PPO-ptx"))
    gap = _last(rows["PPO-ptx"], "reward/mean") - _last(rows["PPO"], "reward/mean")
    return {
        "PPO-ptx keeps the text": f"{_ok(mixed <= KEPT)} {mixed - 1:+.1%}",
        "plain PPO does not": f"{_ok(plain > KEPT)} {plain - 1:+.1%}",
        "reward, PPO-ptx - PPO": f"{_ok(abs(gap) <= COMPARABLE)} {gap:+.2f}",
    }


def _ok(good: bool) -> str:
    return "ok  " if good else "MISS"


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.fmean(row[name] for row in rows[-LAST:])


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    mixed = f", SFT loss {_last(rows, 'loss/pretrain'):.2f}" if "loss/pretrain" in rows[-1] else ""
    return (
        f"reward {_last(rows, 'reward/mean'):.2f}, KL {_last(rows, 'kl/ref'):.1f}, "
        f"length {_last(rows, 'rollout/length_mean'):.1f}{mixed}, "
        f"{rows[-1]['samples/total']:,} samples in {sum(row['time/step'] for row in rows):.0f} s"
    )


if __name__ == "__main__":
    main()
