"""Advantages by name: functions of what a batch earned. An algorithm of one's own is one more:

    def mine(outcome: Outcome, config: AdvantageConfig) -> Advantages

named `learn.advantage.kind: mypackage.mymodule:mine`, takes the place of a built-in one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, zeros_like

from distrl.algo import gae, group_advantages, masked_whiten
from distrl.config import AdvantageConfig, ConfigError, blamed, resolve


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a batch of B responses of at most T tokens earned; no gradients.

    Attributes:
        rewards_BT: each token's reward; the score is on the last one, and the leash in all of them
            where it is part of the reward. 0 on padding.
        values_BT: the critic's, where there is one.
        mask_BT: True on response tokens.
        samples: N responses of each prompt, which follow one another.
    """

    rewards_BT: Tensor
    values_BT: Tensor | None
    mask_BT: Tensor
    samples: int


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """`advantages` [B, T], 0 on padding; `returns` [B, T], what the critic should have said, where
    there is one."""

    advantages: Tensor
    returns: Tensor | None = None


Estimator = Callable[[Outcome, AdvantageConfig], Advantages]


def by_critic(outcome: Outcome, config: AdvantageConfig) -> Advantages:
    """PPO's and A2C's (lam = 1): generalised advantage estimation."""
    assert outcome.values_BT is not None  # the learner makes a critic for this kind
    advantages_BT, returns_BT = gae(
        outcome.rewards_BT, outcome.values_BT, outcome.mask_BT, config.gamma, config.lam
    )
    return Advantages(advantages=advantages_BT, returns=returns_BT)


def against_group(outcome: Outcome, config: AdvantageConfig) -> Advantages:
    """GRPO's, RLOO's, REINFORCE++-baseline's: a response's whole reward against its group's, the
    same on each of its tokens. With the leash in the reward and scaled by the deviation, a group of
    equal scores is not 0: the noise of its KL is all there is, and comes to a deviation of 1."""
    total_GN = outcome.rewards_BT.sum(1).view(-1, outcome.samples)
    advantages_GN = group_advantages(total_GN, config.baseline, config.scale)
    return Advantages(advantages=advantages_GN.reshape(-1, 1) * outcome.mask_BT)


def to_come(outcome: Outcome, config: AdvantageConfig) -> Advantages:
    """REINFORCE's: the rewards from a token on, discounted. Whitened over the batch (which takes
    their mean off: a baseline) it is REINFORCE++ (Hu 2025)."""
    nothing_BT = zeros_like(outcome.rewards_BT)
    returns_BT, _ = gae(outcome.rewards_BT, nothing_BT, outcome.mask_BT, config.gamma, 1.0)
    return Advantages(advantages=returns_BT)


ESTIMATORS: dict[str, Estimator] = {"gae": by_critic, "group": against_group, "returns": to_come}


def estimate(outcome: Outcome, config: AdvantageConfig) -> Advantages:
    """The advantages that `config` asks for, whitened where it says so.

    Raises ConfigError where it names a function that is not there, answers with something else, or
    (one of the user's own) fails.
    """
    mask_BT = outcome.mask_BT
    if config.whiten_rewards:
        whitened_BT = masked_whiten(outcome.rewards_BT, mask_BT, shift_mean=False)
        outcome = replace(outcome, rewards_BT=whitened_BT)
    estimated = estimator(config.kind)
    with blamed(config.kind, "learn.advantage.kind"):
        found = estimated(outcome, config)
    if not isinstance(found, Advantages):
        raise ConfigError(
            f"learn.advantage.kind={config.kind} gave {type(found).__name__}; Advantages were due"
        )
    if found.advantages.shape != mask_BT.shape:
        raise ConfigError(
            f"learn.advantage.kind={config.kind} gave advantages of shape "
            f"{tuple(found.advantages.shape)}; {tuple(mask_BT.shape)} was due"
        )
    if not config.whiten:
        return found
    return replace(found, advantages=masked_whiten(found.advantages, mask_BT))


def estimator(kind: str) -> Estimator:
    """The function of a name, or at `module:function`. Raises ConfigError."""
    return ESTIMATORS.get(kind) or resolve(kind, "learn.advantage.kind")
