"""An algorithm of one's own, as the README shows it: best of the group against the rest.

learn:
  advantage: {kind: "tests.learn.own_algorithm:best_of_group", whiten: false}
  objective: {kind: "tests.learn.own_algorithm:likelihood"}
"""

from __future__ import annotations

from torch import zeros_like

from distrl.algo import Surrogate
from distrl.config import AdvantageConfig, ObjectiveConfig
from distrl.learn.advantages import Advantages, Outcome
from distrl.learn.objectives import Tokens


def best_of_group(outcome: Outcome, config: AdvantageConfig) -> Advantages:
    """1 on the tokens of each prompt's best response, 0 on all others (rejection sampling)."""
    total_GN = outcome.rewards_BT.sum(1).view(-1, outcome.samples)
    best_GN = total_GN == total_GN.max(1, keepdim=True).values
    return Advantages(advantages=best_GN.reshape(-1, 1) * outcome.mask_BT.float())


def likelihood(tokens: Tokens, config: ObjectiveConfig) -> Surrogate:
    """-A log p: learn what was best by heart."""
    nothing = zeros_like(tokens.logprobs)
    return Surrogate(loss=-tokens.advantages * tokens.logprobs, clipped=nothing, ratio=nothing)
