"""The demo's reward after the same number of samples, by TRL's PPOTrainer and by ours.

    python benchmarks/peer_trl_reward.py --from runs/demo [--steps 40] [--seeds 3]

Both start from the finished stages of a demo run: its policy, and its reward model, from which the
critic starts too. Both take 128 prompts a step, a sample of each, one epoch of four minibatches,
a constant learning rate of 4e-4 from the first step on, and 0.15 a nat of KL. TRL is told to read a
cut response's reward at an end-of-sequence token, as our reward model was trained to. Ours is as a
user would run it: asynchronous, a step behind.

Threshold, set before the first run: ours no lower than TRL's by more than 0.1 of the standard
deviation of the SFT policy's scores (mean of the last ten steps, mean of the seeds).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, apart, fingerprint, metrics, plot_rewards, report, spread, train_on
from peer_trl import CORES, WORKER, trl_environment
from scipy import stats

LAST, BATCH, RESPONSE, MINIBATCHES = 10, 128, 40, 4
LR, KL, BETAS = 4e-4, 0.15, (0.9, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    python = trl_environment()
    runs: dict[str, list[list[dict[str, Any]]]] = {"ours": [], "TRL": []}
    with tempfile.TemporaryDirectory(prefix="distrl-benchmark-") as scratch:
        folder = Path(scratch)
        bias = apart(_prepare, options.source, folder)
        for seed in range(options.seeds):
            runs["ours"].append(_ours(options.source, options.steps, seed))
            runs["TRL"].append(_trl(options.source, folder, python, options.steps, seed, bias))
    finals = {side: [_final(run, "reward/mean") for run in those] for side, those in runs.items()}
    gap = statistics.fmean(finals["ours"]) - statistics.fmean(finals["TRL"])
    picture = ROOT / "runs" / "benchmark-peer-trl-reward.png"
    plot_rewards(picture, runs, "PPO of")
    report(
        f"Reward after {BATCH * options.steps:,} samples",
        {
            **{f"{side}, reward": spread(values) for side, values in finals.items()},
            **{
                f"{side}, KL, nats a response": spread([_final(run, "kl/ref") for run in those])
                for side, those in runs.items()
            },
            "ours - TRL >= -0.1": f"{'ok  ' if gap >= -0.1 else 'MISS'} {_difference(finals)}",
            "picture": str(picture),
        },
        f"python benchmarks/peer_trl_reward.py --steps {options.steps} --seeds {options.seeds}",
    )


def _prepare(source: Path, folder: Path) -> float:
    """The reward model as transformers has them, and the prompts; the bias of its head, for which
    that class has no place."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from distrl.config import DataConfig
    from distrl.data.sources import load_prompts
    from distrl.data.tokenizer import load_tokenizer
    from distrl.models import ScalarModel

    trained = source / "reward-model" / "model"
    ours = ScalarModel.load(trained)
    model = AutoModelForSequenceClassification.from_pretrained(trained, num_labels=1)
    with torch.no_grad():
        model.score.weight.copy_(ours.gain * ours.head.weight)
    model.save_pretrained(folder / "reward-model")
    rows = load_prompts(DataConfig(), load_tokenizer(source / "sft" / "policy"), "train")
    (folder / "prompts.json").write_text(json.dumps([row.token_ids.tolist() for row in rows]))
    return float(ours.gain * ours.head.bias + ours.bias)


def _ours(source: Path, steps: int, seed: int) -> list[dict[str, Any]]:
    words = [
        "--generate.samples_per_prompt", "1", "--driver.prompts_per_step", str(BATCH),
        "--generate.max_new_tokens", str(RESPONSE),
        "--learn.lr", str(LR), "--learn.critic_lr", str(LR), "--learn.schedule", "constant",
        "--learn.warmup_steps", "0",
        "--learn.minibatches", str(MINIBATCHES),
        "--learn.kl.kind", "fixed", "--learn.kl.coef", str(KL),
    ]  # fmt: skip
    return metrics(train_on(source, steps=steps, seed=seed, label="peer-trl-reward", words=words))


def _trl(
    source: Path, folder: Path, python: Path, steps: int, seed: int, bias: float
) -> list[dict[str, Any]]:
    """TRL's steps, under our names. A run from the same weights that has ended serves again."""
    kept = ROOT / "runs" / f"benchmark-peer-trl-reward-{seed}" / f"trl-{steps}.json"
    start = fingerprint(source)
    if not kept.exists() or json.loads(kept.read_text()).get("start") != start:
        job = folder / "job.json"
        job.write_text(
            json.dumps(
                {"batch": BATCH, "response": RESPONSE, "epochs": 1, "minibatches": MINIBATCHES}
                | {"steps": steps, "seed": seed, "threads": CORES, "lr": LR, "kl_coef": KL}
                | {"adam_betas": BETAS, "reward_bias": bias, "out": str(folder / "trl.json")}
                | {
                    "policy": str(source / "sft" / "policy"),
                    "prompts": str(folder / "prompts.json"),
                }
                | {"reward_model": str(folder / "reward-model")}
            )
        )
        silent = {"TRL_EXPERIMENTAL_SILENCE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        print(f"$ TRL, {steps} steps, seed {seed}", flush=True)
        subprocess.run(
            [python, "-I", WORKER, job],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | silent | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(CORES)},
        )
        made = json.loads((folder / "trl.json").read_text())
        kept.write_text(json.dumps(made | {"start": start}))
    said = json.loads(kept.read_text())
    return [
        {"samples/total": BATCH * (place + 1), "reward/mean": score, "kl/ref": kl}
        for place, (score, kl) in enumerate(zip(said["scores"], said["kl"], strict=True))
    ]


def _final(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(row[name] for row in rows[-LAST:])


def _difference(finals: dict[str, list[float]]) -> str:
    """Ours less TRL's, with Welch's 95 % interval: their seeds have nothing in common."""
    ours, theirs = finals["ours"], finals["TRL"]
    gap = statistics.fmean(ours) - statistics.fmean(theirs)
    if len(ours) < 2:
        return f"{gap:+.2f} (one seed)"
    interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    return f"{gap:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


if __name__ == "__main__":
    main()
