"""Rewards that are a function of text: `module:function`, resolved once, checked at each call."""

from __future__ import annotations

import math
from collections.abc import Sequence

from distrl.config import resolve
from distrl.records import Rollout
from distrl.roles import ScoreFailed


class RuleReward:
    """One function from (prompt, response, meta) to a number.

    `prompt` and `response` are texts, `meta` the further columns of the prompt's row; all
    are passed by keyword.
    """

    def __init__(self, name: str, path: str) -> None:
        """Resolve `path`; ConfigError says which half of it is not there."""
        self.name = name
        self.path = path
        self._function = resolve(path, "reward function")

    def scores(self, rollouts: Sequence[Rollout]) -> list[list[float] | ScoreFailed]:
        """For each group a number a sample, or the failure of that group alone."""
        return [self._group(rollout) for rollout in rollouts]

    def _group(self, rollout: Rollout) -> list[float] | ScoreFailed:
        try:
            return [self._one(rollout, sample.text) for sample in rollout.samples]
        except ScoreFailed as failure:
            return failure

    def _one(self, rollout: Rollout, response: str) -> float:
        prompt = rollout.prompt
        try:
            value = float(self._function(prompt=prompt.text, response=response, meta=prompt.meta))
        except Exception as error:  # a user's function: whatever it raises is this group's failure
            raise self._failure(rollout, f"raised {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise self._failure(rollout, f"answered {value}, which is not finite")
        return value

    def _failure(self, rollout: Rollout, what: str) -> ScoreFailed:
        return ScoreFailed(
            f"reward {self.name!r} ({self.path}) {what}; prompt {rollout.prompt.prompt_id!r}"
        )
