"""What a policy update minimises, token by token: one function for each surrogate of the field.

Each returns a ``Surrogate`` of [B, T] tensors, 0 outside the mask, and leaves it to the caller how
tokens become one number (``token_shares``) and whether they are weighted by importance. Throughout
ρ = exp(logp − logp_old), and old log-probabilities and advantages are constants. Log-ratios stay
within ±20, so that exp is finite. All raise ValueError on shapes that do not fit and on bounds
that make no sense.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from distrl.algo.checks import check_axes, check_choice, check_range
from distrl.algo.kl import LOG_LIMIT, kl_estimate
from distrl.algo.masked import zero_outside

Aggregate = Literal["token", "sequence", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """All [B, T]. Only ``loss`` carries a gradient.

    Attributes:
        loss: what each token adds to the loss, before its share.
        clipped: 1 on tokens whose loss a bound changed, hence those without gradient.
        ratio: ρ of each token (of its sequence where the surrogate looks at sequences).
    """

    loss: Tensor
    clipped: Tensor
    ratio: Tensor


def clipped_surrogate(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Surrogate:
    """−min(ρA, clip(ρ, 1 − low, 1 + high) A)   (Schulman et al. 2017, eq. 7).

    Unequal bounds are DAPO's (Yu et al. 2025). ``dual_clip`` c > 1 bounds the objective by cA where
    A < 0 (Ye et al. 2020, eq. 5), so a token that became far likelier cannot dominate the batch.
    """
    new_BT, old_BT, advantages_BT = _cleaned(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT)
    _check_bounds(clip_low, clip_high, dual_clip)
    ratio_BT = _ratio(new_BT - old_BT)
    return _bounded(ratio_BT, advantages_BT, mask_BT, clip_low, clip_high, dual_clip)


def sequence_surrogate(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Surrogate:
    """GSPO-token (Zheng et al. 2025, eq. 13 and 14): the clipped surrogate with the ratio

        sg(s) exp(logp_t − sg(logp_t)),   s = exp(mean_t(logp_t − logp_old,t)),

    in value s, the geometric mean of a sequence's ratios, on each of its tokens; in gradient
    s ∇logp_t, the token's own. So a token's advantage, weight and clip move that token alone, where
    s itself (GSPO, eq. 5) would spread them over the sequence. With one advantage a sequence and
    the shares of "sequence" value and gradient are GSPO's. The mean is over the mask. Bounds are
    far narrower than those of tokens (the paper's, by default).
    """
    new_BT, old_BT, advantages_BT = _cleaned(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT)
    _check_bounds(clip_low, clip_high, None)
    length_B1 = mask_BT.bool().sum(1, keepdim=True).clamp(min=1)
    mean_B1 = (new_BT - old_BT).sum(1, keepdim=True) / length_B1
    ratio_BT = _ratio(mean_B1.detach() + (new_BT - new_BT.detach()))
    return _bounded(ratio_BT, advantages_BT, mask_BT, clip_low, clip_high, None)


def capped_weight_surrogate(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> Surrogate:
    """CISPO (MiniMax-M1, Chen et al. 2025, eq. 4): −sg(clip(ρ, 1 − low, 1 + high)) A logp.

    The weight is clipped and the gradient goes on: no token falls silent, as rare ones do under
    PPO's clip. The paper leaves the lower bound open (low = 1) and tunes the upper one.
    ``clipped`` marks the capped weights here.
    """
    new_BT, old_BT, advantages_BT = _cleaned(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT)
    _check_bounds(clip_low, clip_high, None)
    ratio_BT = _ratio(new_BT - old_BT).detach()
    weight_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    return Surrogate(
        loss=-zero_outside(weight_BT * advantages_BT * new_BT, mask_BT),
        clipped=zero_outside((weight_BT != ratio_BT).to(ratio_BT.dtype), mask_BT),
        ratio=zero_outside(ratio_BT, mask_BT),
    )


def penalised_surrogate(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    coef: float,
    kl_BT: Tensor | None = None,
) -> Surrogate:
    """−(ρA − β KL(old ‖ new))   (Schulman et al. 2017, eq. 8); ``coef`` is β.

    ``kl_BT`` is the divergence in each state where it is known exactly. Otherwise it is estimated
    from the token by ρ − 1 − log ρ (k3: the tokens are the old policy's), whose gradient is
    that of the divergence in expectation.
    """
    new_BT, old_BT, advantages_BT = _cleaned(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT)
    check_range("coef", coef, 0)
    ratio_BT = _ratio(new_BT - old_BT)
    if kl_BT is None:
        kl_BT = kl_estimate(old_BT, new_BT, "k3")
    check_axes(logprobs_BT=new_BT, kl_BT=kl_BT)
    return Surrogate(
        loss=zero_outside(coef * kl_BT - ratio_BT * advantages_BT, mask_BT),
        clipped=torch.zeros_like(new_BT),
        ratio=zero_outside(ratio_BT.detach(), mask_BT),
    )


def policy_gradient(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor
) -> Surrogate:
    """−A logp: REINFORCE (Williams 1992), and with a critic's advantages A2C (Mnih et al. 2016).

    Its gradient is right at the policy that sampled, so it suits one pass over fresh data; the old
    log-probabilities only serve the ratio that is reported.
    """
    new_BT, old_BT, advantages_BT = _cleaned(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT)
    return Surrogate(
        loss=-advantages_BT * new_BT,
        clipped=torch.zeros_like(new_BT),
        ratio=zero_outside(_ratio(new_BT - old_BT).detach(), mask_BT),
    )


def token_shares(mask_BT: Tensor, how: Aggregate = "token", longest: int | None = None) -> Tensor:
    """What share of the batch's loss each token has; the loss is Σ share · token loss.

        token      1/N: a mean over all N tokens (DAPO; InstructGPT)
        sequence   1/(B |y|): a mean over sequences of their tokens' mean (GRPO, GSPO)
        constant   1/(B L): sums over tokens by the constant ``longest`` L, the most tokens that a
                   response may have (Dr. GRPO, Liu et al. 2025), so that long wrong answers are
                   not let off

    B counts the sequences that have a token in the mask. Shares are what makes a batch divisible:
    the parts' sums add up, however it is cut. Returns shares_BT in float32, 0 outside the mask.
    Raises ValueError on another shape, an unknown option, or "constant" without ``longest``.
    """
    check_axes(mask_BT=mask_BT)
    check_choice("how", how, get_args(Aggregate))
    mask_BT = mask_BT.bool()
    lengths_B1 = mask_BT.sum(1, keepdim=True)
    sequences = (lengths_B1 > 0).sum().clamp(min=1)
    if how == "token":
        whole = mask_BT.sum().clamp(min=1)
    elif how == "sequence":
        whole = sequences * lengths_B1.clamp(min=1)
    elif longest is None or longest < 1:
        raise ValueError(f"'constant' needs the longest response in tokens; got {longest}")
    else:
        whole = sequences * longest
    return mask_BT / whole


def _cleaned(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three with 0 outside the mask; old log-probabilities and advantages as constants."""
    check_axes(
        logprobs_BT=logprobs_BT,
        old_logprobs_BT=old_logprobs_BT,
        advantages_BT=advantages_BT,
        mask_BT=mask_BT,
    )
    return (
        zero_outside(logprobs_BT, mask_BT),
        zero_outside(old_logprobs_BT, mask_BT).detach(),
        zero_outside(advantages_BT, mask_BT).detach(),
    )


def _check_bounds(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    check_range("clip_low", clip_low, 0)
    check_range("clip_high", clip_high, 0)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must exceed 1 (3 is usual) or be None; got {dual_clip}")


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_LIMIT, LOG_LIMIT).exp()


def _bounded(
    ratio_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Surrogate:
    plain_BT = ratio_BT * advantages_BT
    bounded_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high) * advantages_BT
    objective_BT = torch.minimum(plain_BT, bounded_BT)
    if dual_clip is not None:
        floor_BT = torch.where(advantages_BT < 0, dual_clip * advantages_BT, -torch.inf)
        objective_BT = torch.maximum(objective_BT, floor_BT)
    binds_BT = (objective_BT != plain_BT).to(plain_BT.dtype)
    return Surrogate(
        loss=-objective_BT,  # advantages are 0 outside the mask, and so is this
        clipped=zero_outside(binds_BT, mask_BT),
        ratio=zero_outside(ratio_BT.detach(), mask_BT),
    )
