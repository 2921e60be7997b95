"""What to do about tokens that an older policy sampled."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from distrl.algo.checks import check_axes, check_choice, check_range
from distrl.algo.kl import LOG_LIMIT
from distrl.algo.masked import zero_outside

WeightMode = Literal["token", "sequence", "geometric"]


@torch.no_grad()
def importance_ratio(
    proximal_BT: Tensor, behaviour_BT: Tensor, mask_BT: Tensor, mode: WeightMode = "token"
) -> Tensor:
    """π_prox / π_behaviour on each token, before anything is cut.

        token      one ratio a token: little variance, some bias
        sequence   the product of a sequence's ratios, on each of its tokens: no bias
        geometric  that product's |y|-th root, on each of its tokens: how far a token of the
                   sequence is off as a rule, whatever its length

    Returns ratio_BT, 0 outside the mask, without gradients; log-ratios above 20 count as 20, so
    nothing overflows. Raises ValueError on shapes that do not fit or an unknown mode.
    """
    check_axes(proximal_BT=proximal_BT, behaviour_BT=behaviour_BT, mask_BT=mask_BT)
    check_choice("mode", mode, get_args(WeightMode))
    log_ratio_BT = zero_outside(proximal_BT - behaviour_BT, mask_BT)
    if mode != "token":
        total_B1 = log_ratio_BT.sum(1, keepdim=True)
        if mode == "geometric":
            total_B1 = total_B1 / mask_BT.bool().sum(1, keepdim=True).clamp(min=1)
        log_ratio_BT = total_B1.expand_as(log_ratio_BT)
    return zero_outside(log_ratio_BT.clamp(max=LOG_LIMIT).exp(), mask_BT)


@torch.no_grad()
def importance_weights(
    proximal_BT: Tensor,
    behaviour_BT: Tensor,
    mask_BT: Tensor,
    mode: WeightMode = "token",
    cap: float = 2.0,
    reject: bool = False,
    floor: float = 0.0,
) -> Tensor:
    """w = min(π_prox / π_behaviour, cap), the weight of decoupled PPO (Hilton et al. 2022).

    The ratio is that of ``importance_ratio`` in its ``mode``. Behaviour log-probabilities are the
    engine's, taken when the token was sampled; the proximal ones are the learner's before its
    update. Truncation at ``cap`` follows Espeholt et al. 2018 (V-trace, ρ̄). With ``reject`` a
    weight above the cap becomes 0 instead, and so does one below ``floor``: token by token that is
    IcePop's two-sided mask (Ling team 2025), by sequence it rejects whole sequences.

    Returns weights_BT, 0 outside the mask, without gradients. Raises ValueError on shapes that do
    not fit, an unknown mode, a cap that is not positive, or a floor outside [0, cap].
    """
    if not cap > 0:
        raise ValueError(f"cap must be positive; got {cap}")
    check_range("floor", floor, 0, cap)
    ratio_BT = importance_ratio(proximal_BT, behaviour_BT, mask_BT, mode)
    if reject:
        return torch.where((ratio_BT > cap) | (ratio_BT < floor), 0, ratio_BT)
    return zero_outside(ratio_BT.clamp(floor, cap), mask_BT)


@torch.no_grad()
def effective_sample_size(weights_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(Σw)² / (n Σw²) over the n masked tokens (Kish 1965), a scalar.

    1 when all weights are equal and 1/n when one token holds them all; 0 when the mask is empty or
    every weight is 0. Raises ValueError on shapes that do not fit.
    """
    check_axes(weights_BT=weights_BT, mask_BT=mask_BT)
    weights_BT = zero_outside(weights_BT, mask_BT)
    tiny = torch.finfo(weights_BT.dtype).tiny
    unit_BT = weights_BT / weights_BT.norm().clamp(min=tiny)
    return (unit_BT.sum().square() / mask_BT.bool().sum().clamp(min=1)).clamp(max=1)
