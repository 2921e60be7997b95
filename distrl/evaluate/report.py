"""A comparison for people (table, continuations, plot) and for programs (JSON)."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none is opened

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distrl.disk import write_whole
from distrl.evaluate.compare import Comparison
from distrl.evaluate.policy import EvaluationRow
from distrl.evaluate.stats import Interval
from distrl.metrics import read_jsonl

LABELS = {
    "reward": "reward",
    "kl": "KL to reference (nats)",
    "length": "length (tokens)",
    "judge": "independent judge",
}


def comparison_table(comparison: Comparison) -> Table:
    """Before, after and change of everything measured, with 95 % intervals."""
    before, after = comparison.before, comparison.after
    table = Table(
        title=f"{len(before.prompt_ids)} held-out prompts, {before.samples_per_prompt} "
        "sample(s) of each, 95 % intervals"
    )
    table.add_column("")
    for column in (before.name, after.name, "change"):
        table.add_column(column, justify="right")
    for name, measure in comparison.measures.items():
        cells = map(_interval, (measure.before, measure.after))
        table.add_row(LABELS[name], *cells, _interval(measure.change, signed=True))
    if comparison.gain is not None:
        unit = f"reward gain (std of {before.name})"
        table.add_row(unit, "", "", _interval(comparison.gain, signed=True))
    for name, wins in comparison.wins.items():
        table.add_row(f"win rate by {LABELS[name]}", "", _interval(wins), "")
    shares = {**comparison.distinct, "cut by length": comparison.truncated}
    for name, (one, two) in shares.items():
        table.add_row(name, f"{one:.3f}", f"{two:.3f}", f"{two - one:+.3f}")
    return table


def continuations(comparison: Comparison, count: int, *, seed: int = 0) -> Table:
    """`count` prompts with a response of each policy; the seed chooses them, not their scores."""
    pairs = drawn(comparison, count, seed=seed)
    table = Table(title=f"{len(pairs)} prompts drawn by seed {seed}, not picked", show_lines=True)
    table.add_column("prompt", ratio=1)
    table.add_column(comparison.before.name, ratio=2)
    table.add_column(comparison.after.name, ratio=2)
    for one, two in pairs:
        table.add_row(Text(one.prompt), _response(one), _response(two))
    return table


def drawn(
    comparison: Comparison, count: int, *, seed: int = 0
) -> list[tuple[EvaluationRow, EvaluationRow]]:
    """(before, after): the first samples of `count` prompts that the seed draws."""
    firsts = [
        evaluation.rows[:: evaluation.samples_per_prompt]
        for evaluation in (comparison.before, comparison.after)
    ]
    pairs = list(zip(*firsts, strict=True))
    return random.Random(seed).sample(pairs, min(count, len(pairs)))


def print_report(comparison: Comparison, shown: int, console: Console | None = None) -> None:
    """The table, what is not in it, and `shown` continuations side by side."""
    console = console or Console()
    console.print(comparison_table(comparison))
    if comparison.left_out_reason is not None:
        asked = len(comparison.before.prompt_ids) + comparison.left_out
        why = " ".join(comparison.left_out_reason.split())
        console.print(
            Text(
                f"left out, as a reward failed on a sample of one policy or the other: "
                f"{comparison.left_out} of {asked} prompts; the first: {why}"
            )
        )
    if shown:
        console.print(continuations(comparison, shown))


def write_json(comparison: Comparison, path: Path) -> None:
    """`evaluation.json`: every number of the table, and every response of both policies."""
    body: dict[str, Any] = asdict(comparison)
    body["prompts"] = len(comparison.before.prompt_ids)
    write_whole(path, json.dumps(body, indent=1, allow_nan=False))


class NothingToPlot(ValueError):
    """No step of a run has both a reward and a KL."""


def plot_reward_vs_kl(metrics: Path, path: Path, comparison: Comparison | None = None) -> None:
    """Reward against the square root of KL over a run, with the evaluated policies.

    The axis of Gao et al. 2022, "Scaling Laws for Reward Model Overoptimization": the
    distance of a policy from its reference grows like the root of KL. Raises NothingToPlot
    where `metrics` has no step with both.
    """
    rows = read_jsonl(metrics)
    points = [
        (row["step"], row["kl/ref"], row["reward/mean"])
        for row in rows
        if row.get("kl/ref") is not None and row.get("reward/mean") is not None
    ]
    if not points:
        raise NothingToPlot(f"{metrics} has no step with both kl/ref and reward/mean")
    step, kl, reward = np.array(points, dtype=np.float64).T
    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    try:
        # The estimate of a KL near 0 may fall below it; the root then is 0.
        root = np.sqrt(kl.clip(min=0))
        axes.plot(root, reward, color="0.8", linewidth=1, zorder=1)
        dots = axes.scatter(root, reward, c=step, cmap="viridis", s=18, zorder=2)
        figure.colorbar(dots, label="learner step")
        if comparison is not None:
            _evaluated(axes, comparison)
        axes.set_xlabel("square root of KL to the reference policy (√nats)")
        axes.set_ylabel("mean reward")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)


def _evaluated(axes: Any, comparison: Comparison) -> None:
    reward, kl = comparison.measures["reward"], comparison.measures["kl"]
    sides = (comparison.before, "o"), (comparison.after, "D")
    for (side, marker), y, x in zip(
        sides, (reward.before, reward.after), (kl.before, kl.after), strict=True
    ):
        across, up = _errors(x, root=True), _errors(y)
        axes.errorbar(
            across[0], up[0], xerr=across[1], yerr=up[1], fmt=marker, color="crimson",
            markersize=7, capsize=3, zorder=3,
            mfc="white" if marker == "o" else "crimson", label=f"{side.name}, held out",
        )  # fmt: skip
    axes.legend(loc="best")


def _errors(interval: Interval, *, root: bool = False) -> tuple[float, list[list[float]]]:
    """(value, [[below], [above]]) as matplotlib's error bars want it."""
    ends = np.array([interval.low, interval.value, interval.high])
    low, value, high = np.sqrt(ends.clip(min=0)) if root else ends
    return float(value), [[max(value - low, 0.0)], [max(high - value, 0.0)]]


def _interval(interval: Interval, *, signed: bool = False) -> str:
    ends: Sequence[float] = (interval.value, interval.low, interval.high)
    value, low, high = (f"{x:+.2f}" if signed else f"{x:.2f}" for x in ends)
    return f"{value} [{low}, {high}]"


def _response(row: EvaluationRow) -> Text:
    """As text, not markup: a response may hold brackets."""
    judge = "" if row.judge is None else f", judge {row.judge:+.2f}"
    scores = Text(f"\nreward {row.reward:+.2f}{judge}", style="dim")
    return Text(row.response.strip() + ("" if row.finish_reason == "stop" else " …")) + scores
