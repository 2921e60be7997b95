"""What to do about tokens that an older policy sampled."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from distrl.algo.checks import check_axes, check_choice
from distrl.algo.kl import LOG_LIMIT
from distrl.algo.masked import zero_outside

WeightMode = Literal["token", "sequence"]


@torch.no_grad()
def importance_weights(
    proximal_BT: Tensor,
    behaviour_BT: Tensor,
    mask_BT: Tensor,
    mode: WeightMode = "token",
    cap: float = 2.0,
    reject: bool = False,
) -> Tensor:
    """w = min(π_prox / π_behaviour, cap), the weight of decoupled PPO (Hilton et al. 2022).

        token      one ratio a token: little variance, some bias
        sequence   the product of a sequence's ratios, on each of its tokens: no bias but the cap's

    Behaviour log-probabilities are the engine's, taken when the token was sampled; the proximal
    ones are the learner's before its update. Truncation at ``cap`` follows Espeholt et al. 2018
    (V-trace, ρ̄); with ``reject`` a weight above the cap becomes 0 instead.

    Returns weights_BT, 0 outside the mask, without gradients; log-ratios above 20 count as 20, so
    nothing overflows. Raises ValueError on shapes that do not fit, an unknown mode, or a cap that
    is not positive.
    """
    check_axes(proximal_BT=proximal_BT, behaviour_BT=behaviour_BT, mask_BT=mask_BT)
    check_choice("mode", mode, get_args(WeightMode))
    if not cap > 0:
        raise ValueError(f"cap must be positive; got {cap}")
    log_ratio_BT = zero_outside(proximal_BT - behaviour_BT, mask_BT)
    if mode == "sequence":
        log_ratio_BT = log_ratio_BT.sum(1, keepdim=True).expand_as(log_ratio_BT)
    ratio_BT = log_ratio_BT.clamp(max=LOG_LIMIT).exp()
    kept_BT = torch.where(ratio_BT > cap, 0, ratio_BT) if reject else ratio_BT.clamp(max=cap)
    return zero_outside(kept_BT, mask_BT)


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
