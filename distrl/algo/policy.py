"""The policy's loss: PPO's clipped objective, with its dual and decoupled forms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distrl.algo.checks import check_axes, check_range
from distrl.algo.kl import LOG_LIMIT, kl_estimate
from distrl.algo.masked import masked_mean, zero_outside


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
    check_axes(
        logprobs_BT=logprobs_BT,
        old_logprobs_BT=old_logprobs_BT,
        advantages_BT=advantages_BT,
        mask_BT=mask_BT,
        weights_BT=mask_BT if weights_BT is None else weights_BT,
    )
    check_range("clip_low", clip_low, 0)
    check_range("clip_high", clip_high, 0)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must exceed 1 (3 is usual) or be None; got {dual_clip}")

    new_BT = zero_outside(logprobs_BT, mask_BT)
    old_BT = zero_outside(old_logprobs_BT, mask_BT).detach()
    advantages_BT = zero_outside(advantages_BT, mask_BT).detach()
    ratio_BT = (new_BT - old_BT).clamp(-LOG_LIMIT, LOG_LIMIT).exp()
    plain_BT = ratio_BT * advantages_BT
    bounded_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high) * advantages_BT
    objective_BT = torch.minimum(plain_BT, bounded_BT)
    if dual_clip is not None:
        floor_BT = torch.where(advantages_BT < 0, dual_clip * advantages_BT, -torch.inf)
        objective_BT = torch.maximum(objective_BT, floor_BT)
    binds_BT = (objective_BT != plain_BT).to(plain_BT.dtype)
    if weights_BT is not None:
        objective_BT = zero_outside(weights_BT, mask_BT).detach() * objective_BT
    return PolicyLoss(
        loss=-masked_mean(objective_BT, mask_BT),
        clip_fraction=masked_mean(binds_BT, mask_BT),
        approx_kl=masked_mean(kl_estimate(old_BT, new_BT.detach(), "k3"), mask_BT),
        ratio_mean=masked_mean(ratio_BT.detach(), mask_BT),
    )
