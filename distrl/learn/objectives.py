"""Objectives by name: what a policy update minimises, token by token.

    def mine(tokens: Tokens, config: ObjectiveConfig) -> Surrogate

named `learn.objective.kind: mypackage.mymodule:mine`, takes the place of a built-in one. The maths
is in `algo/surrogates.py`; here it gets its settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from distrl.algo import (
    Surrogate,
    capped_weight_surrogate,
    clipped_surrogate,
    penalised_surrogate,
    policy_gradient,
    sequence_surrogate,
)
from distrl.config import ConfigError, ObjectiveConfig, blamed, resolve


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A part of a batch, [B, T] each; only `logprobs` carries a gradient.

    Attributes:
        logprobs: of the policy that is being updated.
        old: of the policy that ratios are taken from.
        advantages: of each token.
        mask: True on the tokens that count.
        penalty: the present price of a nat between old and new policy (`kl_penalty`).
    """

    logprobs: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    penalty: float

    @property
    def four(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the functions of `algo/surrogates.py` take them."""
        return self.logprobs, self.old, self.advantages, self.mask


Objective = Callable[[Tokens, ObjectiveConfig], Surrogate]


def clip(tokens: Tokens, config: ObjectiveConfig) -> Surrogate:
    """PPO; with unequal bounds DAPO's clip-higher, with `dual_clip` its bound from below."""
    return clipped_surrogate(
        *tokens.four,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )


def sequence(tokens: Tokens, config: ObjectiveConfig) -> Surrogate:
    """GSPO, by its form for advantages and weights of a token (GSPO-token)."""
    low, high = config.clip_low, config.clip_high
    return sequence_surrogate(*tokens.four, clip_low=low, clip_high=high)


def capped_weight(tokens: Tokens, config: ObjectiveConfig) -> Surrogate:
    """CISPO."""
    low, high = config.clip_low, config.clip_high
    return capped_weight_surrogate(*tokens.four, clip_low=low, clip_high=high)


def kl_penalty(tokens: Tokens, config: ObjectiveConfig) -> Surrogate:
    """PPO's other form."""
    return penalised_surrogate(*tokens.four, coef=tokens.penalty)


def plain(tokens: Tokens, config: ObjectiveConfig) -> Surrogate:
    """REINFORCE, A2C."""
    return policy_gradient(*tokens.four)


BUILT_IN: dict[str, Objective] = {
    "clip": clip,
    "sequence": sequence,
    "capped_weight": capped_weight,
    "kl_penalty": kl_penalty,
    "policy_gradient": plain,
}


def surrogate(tokens: Tokens, config: ObjectiveConfig) -> Surrogate:
    """What the objective that `config` names makes of `tokens`. Raises ConfigError where it is not
    there, answers with something else, or (one of the user's own) fails."""
    minimised = objective(config.kind)
    with blamed(config.kind, "learn.objective.kind"):
        found = minimised(tokens, config)
    if not isinstance(found, Surrogate) or found.loss.shape != tokens.mask.shape:
        was = tuple(found.loss.shape) if isinstance(found, Surrogate) else type(found).__name__
        raise ConfigError(
            f"learn.objective.kind={config.kind} gave {was}; a Surrogate with a loss for each "
            f"token, of shape {tuple(tokens.mask.shape)}, was due"
        )
    return found


def objective(kind: str) -> Objective:
    """The function of a name, or at `module:function`. Raises ConfigError."""
    return BUILT_IN.get(kind) or resolve(kind, "learn.objective.kind")
