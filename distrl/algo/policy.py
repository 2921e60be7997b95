"""The policy's loss as one number: PPO's clipped objective, with its dual and decoupled forms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distrl.algo.checks import check_axes
from distrl.algo.kl import kl_estimate
from distrl.algo.masked import masked_mean, zero_outside
from distrl.algo.surrogates import clipped_surrogate


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """Scalars. Only ``loss`` carries a gradient."""

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    ratio_mean: Tensor


def ppo_clip_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights_BT: Tensor | None = None,
) -> PolicyLoss:
    """The clipped surrogate (Schulman et al. 2017, eq. 7), negated, as a mean over response tokens.

        ρ = exp(logp − logp_old)     L = −mean_mask[ w · min(ρA, clip(ρ, 1 − low, 1 + high) A) ]

    Unequal bounds are DAPO's (Yu et al. 2025). ``dual_clip`` c > 1 bounds the objective by cA where
    A < 0 (Ye et al. 2020, eq. 5), so a token that became far likelier cannot dominate the batch.
    weights_BT are importance weights from the behaviour to the old (proximal) policy (Hilton et al.
    2022); they multiply tokens and do not enter the denominator.

    Old log-probabilities, advantages and weights are constants. The log-ratio is held within ±20,
    so that exp stays finite. To accumulate micro-batches into one token mean, scale each loss by
    its share of the tokens.

    ``clip_fraction`` counts the tokens whose objective a clip changed, hence those without gradient
    (Ziegler et al. 2019), not all those whose ratio left the bounds; ``approx_kl`` is the k3
    estimate of KL(old ‖ new); all metrics are unweighted. Raises ValueError on shapes that do not
    fit, negative bounds, or a dual_clip not above 1.
    """
    if weights_BT is None:
        weights_BT = mask_BT
    check_axes(logprobs_BT=logprobs_BT, mask_BT=mask_BT, weights_BT=weights_BT)
    token = clipped_surrogate(
        logprobs_BT,
        old_logprobs_BT,
        advantages_BT,
        mask_BT,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    loss_BT = zero_outside(weights_BT, mask_BT).detach() * token.loss
    old_BT, new_BT = (zero_outside(x, mask_BT).detach() for x in (old_logprobs_BT, logprobs_BT))
    return PolicyLoss(
        loss=masked_mean(loss_BT, mask_BT),
        clip_fraction=masked_mean(token.clipped, mask_BT),
        approx_kl=masked_mean(kl_estimate(old_BT, new_BT, "k3"), mask_BT),
        ratio_mean=masked_mean(token.ratio, mask_BT),
    )
