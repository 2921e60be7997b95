"""The maths of RLHF: tensors in, tensors out, and nothing else of distrl.

Names end in their axes: B sequences, T response tokens, V vocabulary, G groups, N samples in a
group, K ranked answers. A mask is 1 on response tokens and 0 elsewhere; whatever stands outside
it, NaN and infinity included, reaches neither a result nor a gradient. A mean over an empty mask
is 0. Metrics carry no gradient.
"""

from __future__ import annotations

from distrl.algo.advantages import explained_variance, gae, group_advantages
from distrl.algo.bounds import largest_gain
from distrl.algo.kl import (
    AdaptiveKL,
    AdaptivePenalty,
    FixedKL,
    LinearKL,
    kl_estimate,
    shape_rewards,
)
from distrl.algo.logprobs import HEAD_BLOCKS, HeadBlocks, head_logprobs, token_logprobs
from distrl.algo.masked import masked_mean, masked_whiten
from distrl.algo.off_policy import effective_sample_size, importance_ratio, importance_weights
from distrl.algo.policy import PolicyLoss, ppo_clip_loss
from distrl.algo.reward_model import (
    expected_calibration_error,
    normalisation,
    pairwise_loss,
    ranking_loss,
)
from distrl.algo.schedules import lr_factor
from distrl.algo.surrogates import (
    Surrogate,
    capped_weight_surrogate,
    clipped_surrogate,
    penalised_surrogate,
    policy_gradient,
    sequence_surrogate,
    token_shares,
)
from distrl.algo.value import ValueLoss, value_loss

__all__ = [
    "HEAD_BLOCKS",
    "AdaptiveKL",
    "AdaptivePenalty",
    "FixedKL",
    "HeadBlocks",
    "LinearKL",
    "PolicyLoss",
    "Surrogate",
    "ValueLoss",
    "capped_weight_surrogate",
    "clipped_surrogate",
    "effective_sample_size",
    "expected_calibration_error",
    "explained_variance",
    "gae",
    "group_advantages",
    "head_logprobs",
    "importance_ratio",
    "importance_weights",
    "kl_estimate",
    "largest_gain",
    "lr_factor",
    "masked_mean",
    "masked_whiten",
    "normalisation",
    "pairwise_loss",
    "penalised_surrogate",
    "policy_gradient",
    "ppo_clip_loss",
    "ranking_loss",
    "sequence_surrogate",
    "shape_rewards",
    "token_logprobs",
    "token_shares",
    "value_loss",
]
