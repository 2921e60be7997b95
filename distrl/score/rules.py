"""Rewards that are a function of text: `module:function`, resolved once, checked at each call."""

from __future__ import annotations

import math
from collections.abc import Sequence

from distrl.config import resolve, told
from distrl.records import Prompt, Rollout
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
            return [self.number(rollout.prompt, sample.text) for sample in rollout.samples]
        except ScoreFailed as failure:
            return failure

    def number(self, prompt: Prompt, response: str) -> float:
        """The reward of one response, finite. Raises ScoreFailed."""
        try:
            value = float(self._function(prompt=prompt.text, response=response, meta=prompt.meta))
        except (Exception, SystemExit) as error:  # a user's function: it fails this group alone
            raise self._failure(prompt, f"raised {told(error, behind=1)}") from error
        if not math.isfinite(value):
            raise self._failure(prompt, f"answered {value}, which is not finite")
        return value

    def _failure(self, prompt: Prompt, what: str) -> ScoreFailed:
        return ScoreFailed(
            f"reward {self.name!r} ({self.path}) {what}; prompt {prompt.prompt_id!r}"
        )
