"""Policies compared on held-out prompts: what got better, by how much, and how surely."""

from distrl.evaluate.compare import Comparison, Measure, compare
from distrl.evaluate.judge import Judge, JudgeFailed, resolve_judge, vader_compound
from distrl.evaluate.policy import EvaluationRow, PolicyEvaluation, evaluate_policy
from distrl.evaluate.report import (
    comparison_table,
    continuations,
    plot_reward_vs_kl,
    print_report,
    write_json,
)
from distrl.evaluate.stats import Interval, distinct_n

__all__ = [
    "Comparison",
    "EvaluationRow",
    "Interval",
    "Judge",
    "JudgeFailed",
    "Measure",
    "PolicyEvaluation",
    "compare",
    "comparison_table",
    "continuations",
    "distinct_n",
    "evaluate_policy",
    "plot_reward_vs_kl",
    "print_report",
    "resolve_judge",
    "vader_compound",
    "write_json",
]
