from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from distrl.evaluate import (
    Comparison,
    EvaluationRow,
    PolicyEvaluation,
    compare,
    plot_reward_vs_kl,
    print_report,
    write_json,
)
from distrl.evaluate.report import drawn
from distrl.metrics import JSONLSink


def evaluation(name: str, reward: float, kl: float, seed: int, prompts: int = 40):
    rng = np.random.default_rng(seed)
    rows = tuple(
        EvaluationRow(
            prompt_id=f"p{p}",
            sample=s,
            prompt=f"film {p}",
            response=f" is [bold] {name} {p}/{s}",
            reward=float(rng.normal(reward)),
            parts={"model": 0.0},
            kl=float(rng.normal(kl, 2)) if kl else 0.0,
            length=int(rng.integers(5, 30)),
            judge=float(rng.uniform(-1, 1) + reward / 4),
            finish_reason="length" if s else "stop",
        )
        for p in range(prompts)
        for s in range(2)
    )
    return PolicyEvaluation(name=name, samples_per_prompt=2, rows=rows)


@pytest.fixture
def comparison() -> Comparison:
    return compare(evaluation("SFT", 0, 0, 1), evaluation("PPO", 1.8, 9, 2), resamples=200)


def printed(comparison: Comparison, shown: int) -> str:
    out = io.StringIO()
    print_report(comparison, shown, Console(file=out, width=140))
    return out.getvalue()


def test_the_comparison_is_of_what_it_says(comparison):
    before, after = comparison.before.column("reward"), comparison.after.column("reward")
    reward = comparison.measures["reward"]
    assert reward.before.value == pytest.approx(before.mean())
    assert reward.change.value == pytest.approx(after.mean() - before.mean())
    assert comparison.gain is not None
    assert comparison.gain.value == pytest.approx(reward.change.value / before.std())
    assert comparison.gain.low > 0 and comparison.wins["reward"].value > 0.8
    assert comparison.truncated == (0.5, 0.5)
    assert comparison.measures["kl"].before.value == 0.0


def test_scores_that_are_all_equal_give_no_gain():
    varied = evaluation("SFT", 0, 0, 1)
    flat = PolicyEvaluation(
        name="SFT",
        samples_per_prompt=2,
        rows=tuple(replace(row, reward=0.1) for row in varied.rows),
    )
    comparison = compare(flat, evaluation("PPO", 1.8, 9, 2), resamples=100)
    assert comparison.gain is None
    assert "reward gain" not in printed(comparison, 0)


def test_the_table_shows_every_figure_with_its_interval(comparison):
    text = printed(comparison, 8)
    for label in ("reward", "KL to reference", "length", "independent judge", "win rate"):
        assert label in text
    change = comparison.measures["reward"].change
    assert f"{change.value:+.2f} [{change.low:+.2f}, {change.high:+.2f}]" in text
    assert "is [bold] PPO" in text  # a response is text, never markup
    for one, _ in drawn(comparison, 8):
        assert one.prompt in text


def test_what_is_shown_is_drawn_by_seed_not_by_score(comparison):
    shown = drawn(comparison, 8)
    better = compare(comparison.before, evaluation("PPO", -5, 3, 9), resamples=100)
    assert [one.prompt_id for one, _ in drawn(better, 8)] == [one.prompt_id for one, _ in shown]
    assert all(one.prompt_id == two.prompt_id for one, two in shown)
    assert len({one.prompt_id for one, _ in shown}) == 8
    assert len(drawn(comparison, 99)) == 40


def test_json_holds_every_number_and_every_response(comparison, tmp_path):
    write_json(comparison, tmp_path / "evaluation.json")
    body = json.loads((tmp_path / "evaluation.json").read_text())
    reward = comparison.measures["reward"]
    assert body["measures"]["reward"]["after"]["low"] == reward.after.low
    assert body["prompts"] == 40 and len(body["after"]["rows"]) == 80
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_the_plot(comparison, tmp_path):
    sink = JSONLSink(tmp_path / "metrics.jsonl")
    for step in range(1, 20):
        kl = math.nan if step == 7 else 0.5 * step - 0.6  # an estimate may be below zero
        sink.log(step, {"kl/ref": kl, "reward/mean": math.log(step)})
    for shown in (None, comparison):
        plot_reward_vs_kl(tmp_path / "metrics.jsonl", tmp_path / "plot.png", shown)
        assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_without_steps_has_no_plot(tmp_path):
    with pytest.raises(ValueError, match="no step with both"):
        plot_reward_vs_kl(tmp_path / "metrics.jsonl", tmp_path / "plot.png")
