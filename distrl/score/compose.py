"""The reward of a sample: a weighted sum whose parts are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from distrl.config import OWN, ConfigError, OverlongConfig, RewardPart, ScoreConfig
from distrl.models import best_device
from distrl.models.crew import ALONE, Crew
from distrl.records import Rollout, Sample, Score, ScoredRollout
from distrl.roles import ScoreFailed
from distrl.score.model import ModelReward
from distrl.score.rules import RuleReward

PENALTY = "missing_eos_penalty"
OVERLONG = "overlong"
NO_PENALTY = OverlongConfig()


Parts = dict[str, list[float] | ScoreFailed]
"""Of one group: for each part a number a sample, or its failure."""


class Reward(Protocol):
    """One part: numbers for groups, or the failure of each group that got none."""

    name: str

    def scores(self, rollouts: Sequence[Rollout]) -> list[list[float] | ScoreFailed]: ...


class RewardSum:
    """value = Σ weight · part, plus the penalty where the response was cut by length.

    Parts are kept as their rewards gave them, before their weights; a penalty (for a response
    without an end, for an overlong one) stands among them wherever it is set, as 0 where it is not
    due. A score that takes the place of the sum (`missing_eos_score`) stands there as what it took
    away, so that the parts make up the value in any case.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Mapping[str, float],
        missing_eos_penalty: float | None = None,
        overlong: OverlongConfig = NO_PENALTY,
        missing_eos_score: float | None = None,
    ) -> None:
        self.rewards = tuple(rewards)
        self.weights = dict(weights)
        self.missing_eos_penalty = missing_eos_penalty
        self.missing_eos_score = missing_eos_score
        self.overlong = overlong

    @classmethod
    def of(
        cls, config: ScoreConfig, tokenizer: PreTrainedTokenizerBase, crew: Crew = ALONE
    ) -> RewardSum:
        """The rewards that `config.parts` names, loaded; `tokenizer` is the policy's, and `crew`
        shares the passes of reward models.

        Raises ConfigError where there is no part or a function is not there; ModelError where a
        folder holds no reward model.
        """
        if not config.parts:
            raise ConfigError(
                "score.parts is empty and no reward model was put in its place; name one, or "
                "train one with 'distrl reward-model'"
            )
        weights = {part.name: part.weight for part in config.parts}
        rewards = [_reward(part, config, tokenizer, crew) for part in config.parts]
        return cls(
            rewards,
            weights,
            config.missing_eos_penalty,
            config.overlong,
            config.missing_eos_score,
        )

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout | ScoreFailed]:
        """Each group scored, or the first failure among its parts."""
        return self.finished(self.shared(rollouts), rollouts)

    @property
    def has_rules(self) -> bool:
        """Whether a part is a function, which takes one group after the other."""
        return any(isinstance(reward, RuleReward) for reward in self.rewards)

    def shared(self, rollouts: Sequence[Rollout]) -> list[Parts]:
        """For each group the parts that are had of all groups at once: all but rules."""
        by_part = {
            reward.name: reward.scores(rollouts)
            for reward in self.rewards
            if not isinstance(reward, RuleReward)
        }
        return [{name: groups[i] for name, groups in by_part.items()} for i in range(len(rollouts))]

    def finished(
        self, shared: Sequence[Parts], rollouts: Sequence[Rollout]
    ) -> list[ScoredRollout | ScoreFailed]:
        """The groups that `shared` is of, with what rules say of each."""
        return [
            self._group(
                rollout,
                {
                    each.name: parts[each.name] if each.name in parts else each.scores([rollout])[0]
                    for each in self.rewards
                },
            )
            for parts, rollout in zip(shared, rollouts, strict=True)
        ]

    def _group(self, rollout: Rollout, parts: Parts) -> ScoredRollout | ScoreFailed:
        numbers: dict[str, list[float]] = {}
        for name, values in parts.items():
            if isinstance(values, ScoreFailed):
                return values
            numbers[name] = values
        scores = []
        for i, sample in enumerate(rollout.samples):
            mine = {name: values[i] for name, values in numbers.items()}
            value = sum(self.weights[name] * part for name, part in mine.items())
            if not math.isfinite(value):
                return ScoreFailed(f"the weighted sum of {mine} is not finite")
            scores.append(self._charged(sample, value, mine))
        return ScoredRollout(rollout=rollout, scores=tuple(scores))

    def _charged(self, sample: Sample, plain: float, parts: Mapping[str, float]) -> Score:
        """`plain` with what length costs. Responses whose score is replaced get equal ones, to the
        bit: the difference to `plain` is kept, not added."""
        value, kept = plain, dict(parts)
        cut = sample.finish_reason == "length"
        if self.missing_eos_penalty is not None:
            kept[PENALTY] = self.missing_eos_penalty if cut else 0.0
            value += kept[PENALTY]
        if self.missing_eos_score is not None:
            value = self.missing_eos_score if cut else plain
            kept[PENALTY] = value - plain
        if not self.overlong.penalty:
            return Score(value=value, parts=kept)
        kept[OVERLONG] = overlong_penalty(len(sample.token_ids), self.overlong)
        return Score(value=value + kept[OVERLONG], parts=kept, merit=value)


def overlong_penalty(tokens: int, config: OverlongConfig) -> float:
    """0 up to `start` tokens, falling on a line to -penalty at `full` (Yu et al. 2025, eq. 13)."""
    beyond = (tokens - config.start) / (config.full - config.start)
    return -config.penalty * min(max(beyond, 0.0), 1.0)


def with_default_part(config: ScoreConfig, reward_model: Path) -> ScoreConfig:
    """`config` with the run's own reward model in each part that says "own", and as the one part,
    called "reward_model", where it names none."""
    if not config.parts:
        parts = (RewardPart(name="reward_model", model=str(reward_model)),)
    elif any(part.model == OWN for part in config.parts):
        own = {"model": str(reward_model)}
        parts = tuple(
            part.model_copy(update=own) if part.model == OWN else part for part in config.parts
        )
    else:
        return config
    return config.model_copy(update={"parts": parts})


def _reward(
    part: RewardPart, config: ScoreConfig, tokenizer: PreTrainedTokenizerBase, crew: Crew
) -> Reward:
    if part.function is not None:
        return RuleReward(part.name, part.function)
    assert part.model is not None  # RewardPart's own check
    return ModelReward(
        part.name,
        part.model,
        tokenizer,
        batch_tokens=config.batch_tokens,
        device=best_device() if config.gpus else "cpu",
        dtype=config.dtype,
        crew=crew,
        compile=config.compile,
    )
