"""The critic's loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distrl.algo.checks import check_axes, check_range
from distrl.algo.masked import masked_mean, zero_outside


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLoss:
    """Scalars. Only ``loss`` carries a gradient."""

    loss: Tensor
    clip_fraction: Tensor


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    clip: float | None = None,
) -> ValueLoss:
    """½ mean_mask max((V − R)², (clip(V, V_old − c, V_old + c) − R)²), as in Ziegler et al. 2019.

    Without ``clip`` it is ½ mean_mask (V − R)². ``clip_fraction`` counts the tokens whose loss the
    clip raised, hence those without gradient. V_old and R are constants. The factor ½ is inside;
    the weight against the policy's loss is the caller's. Raises ValueError on shapes that do not
    fit or a negative clip.
    """
    check_axes(
        values_BT=values_BT, old_values_BT=old_values_BT, returns_BT=returns_BT, mask_BT=mask_BT
    )
    check_range("clip", 0 if clip is None else clip, 0)
    values_BT = zero_outside(values_BT, mask_BT)
    old_values_BT = zero_outside(old_values_BT, mask_BT).detach()
    returns_BT = zero_outside(returns_BT, mask_BT).detach()

    error_BT = plain_BT = (values_BT - returns_BT).square()
    if clip is not None:
        near_BT = torch.clamp(values_BT, old_values_BT - clip, old_values_BT + clip)
        error_BT = torch.maximum(plain_BT, (near_BT - returns_BT).square())
    return ValueLoss(
        loss=0.5 * masked_mean(error_BT, mask_BT),
        clip_fraction=masked_mean((error_BT > plain_BT).to(plain_BT.dtype), mask_BT),
    )
