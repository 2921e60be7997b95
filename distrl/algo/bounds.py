"""What a leash allows: no policy gains more than its KL pays for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distrl.algo.checks import check_range

ETAS = tuple(2.0**k for k in range(-6, 7))


@torch.no_grad()
def largest_gain(kl: float, ref_rewards_N: Tensor, etas: tuple[float, ...] = ETAS) -> float:
    """An upper bound on E_π[r] − E_ref[r] for any π with KL(π ‖ ref) = kl, nats a response:

        min over η > 0 of (kl + log E_ref exp(η (r − r̄))) / η        (Donsker and Varadhan 1975)

    with r̄ the reference's mean. E_ref is estimated from ``ref_rewards_N``, the rewards of responses
    that the reference sampled: N of them resolve a KL of log N at most, and beyond it the answer is
    infinity. A run that gains more has booked its KL or its rewards wrongly. Raises ValueError on a
    negative kl, etas that are not positive, or no rewards.
    """
    check_range("kl", kl, 0)
    if not len(ref_rewards_N) or not all(eta > 0 for eta in etas):
        raise ValueError("the bound needs rewards of the reference, and etas above 0")
    if kl > math.log(len(ref_rewards_N)):
        return math.inf
    centred_N = ref_rewards_N.double() - ref_rewards_N.double().mean()
    return min(
        (kl + (eta * centred_N).logsumexp(0).item() - math.log(len(centred_N))) / eta
        for eta in etas
    )
