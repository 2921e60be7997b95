"""Rollouts in, numbers out: reward models, rules, and their weighted sum.

A score is a finite number or a failure. A part that fails for one sample fails the whole
group (`ScoreFailed`): a made-up number would be learnt from like any other.
"""

from __future__ import annotations

from distrl.score.compose import RewardSum, with_default_part
from distrl.score.model import ModelReward
from distrl.score.rules import RuleReward
from distrl.score.scorer import LocalScorer

__all__ = ["LocalScorer", "ModelReward", "RewardSum", "RuleReward", "with_default_part"]
