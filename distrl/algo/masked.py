"""Means, variances and whitening over the tokens that count."""

from __future__ import annotations

import torch
from torch import Tensor

from distrl.algo.checks import check_same_shape

EPS = 1e-8


def zero_outside(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is set, 0 elsewhere.

    A selection and not a product: 0 * NaN is NaN, and a gradient of 0 sent through exp(inf) is NaN
    as well. So functions here clear their inputs first and compute afterwards.
    """
    return torch.where(mask.bool(), x, 0)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Σ_mask x / |mask|, a scalar; 0, still in the graph, where the mask is empty.

    x and mask share any one shape; ValueError otherwise.
    """
    check_same_shape(x=x, mask=mask)
    return zero_outside(x, mask).sum() / mask.bool().sum().clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Σ_mask (x − mean)² / |mask|: the biased variance, a scalar; 0 where the mask is empty."""
    return masked_mean((zero_outside(x, mask) - masked_mean(x, mask)).square(), mask)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x − mean) / √(var + 1e-8) inside the mask, 0 outside; ``shift_mean=False`` keeps the mean.

    Biased variance, as in lm-human-preferences (Ziegler et al. 2019): advantages are whitened with
    their mean removed, rewards keep theirs. x and mask share any one shape; ValueError otherwise.
    """
    check_same_shape(x=x, mask=mask)
    if not x.numel():
        return x
    # Counted from the first number inside, so that equal ones cancel without rounding.
    first = x.flatten()[mask.bool().flatten().int().argmax()]
    shifted = zero_outside(x - first, mask)
    mean = masked_mean(shifted, mask)
    whitened = (shifted - mean) * torch.rsqrt(masked_var(shifted, mask) + EPS)
    return zero_outside(whitened if shift_mean else whitened + mean + first, mask)
