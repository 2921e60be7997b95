"""How much better was this action than expected? From a critic, or from the rest of the group."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from distrl.algo.checks import check_axes, check_choice, check_range
from distrl.algo.masked import EPS, masked_mean, masked_var, zero_outside

Baseline = Literal["mean", "leave_one_out", "none"]
Scale = Literal["std", "none"]


@torch.no_grad()
def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    gamma: float,
    lam: float,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016; PPO, Schulman et al. 2017, eq. 11).

        δ_t = r_t + γ V_{t+1} − V_t        A_t = δ_t + γλ A_{t+1}        R_t = A_t + V_t

    Unrolled, A_t = δ_t + (γλ) δ_{t+1} + … + (γλ)^{T−t−1} δ_{T−1}; the PPO paper prints the last
    exponent as T−t+1, which does not follow from its own sum.

    The mask decides what a step is: positions outside it are skipped, so right padding and holes
    (tool output inside a response) alike leave the chain as if they were not there. The value
    after the last step is bootstrap_B, 0 by default: the sequence ended there.

    Returns advantages_BT and returns_BT, 0 outside the mask, without gradients. Raises ValueError
    on shapes that do not fit, or gamma or lam outside [0, 1].
    """
    check_axes(rewards_BT=rewards_BT, values_BT=values_BT, mask_BT=mask_BT)
    check_range("gamma", gamma, 0, 1)
    check_range("lam", lam, 0, 1)
    last_B = values_BT.new_zeros(values_BT.shape[0]) if bootstrap_B is None else bootstrap_B
    check_axes(values_BT=values_BT, bootstrap_B=last_B)

    steps_BT = mask_BT.bool()
    deltas_BT = rewards_BT + gamma * _next_values(values_BT, steps_BT, last_B) - values_BT
    factors_BT = torch.ones_like(deltas_BT).masked_fill(steps_BT, gamma * lam)
    sums_BT = _summed_from_behind(zero_outside(deltas_BT, steps_BT), factors_BT)
    return zero_outside(sums_BT, steps_BT), zero_outside(sums_BT + values_BT, steps_BT)


def _next_values(values_BT: Tensor, steps_BT: Tensor, last_B: Tensor) -> Tensor:
    """Of each place, the value at the first step after it; last_B where there is none."""
    end = values_BT.shape[1]
    places_T = torch.arange(end, device=values_BT.device)
    here_BT = torch.where(steps_BT, places_T, end)
    from_here_BT = here_BT.flip(1).cummin(1).values.flip(1)
    after_BT = pad(from_here_BT[:, 1:], (0, 1), value=end)
    return torch.cat([values_BT, last_B[:, None]], 1).gather(1, after_BT)


def _summed_from_behind(terms_BT: Tensor, factors_BT: Tensor) -> Tensor:
    """x_t = terms_t + factors_t x_{t+1}, and 0 after the end.

    In log2 T sweeps, each of which has a place sum up twice as many (Hillis and Steele 1986; on
    linear recurrences Blelloch 1990): place by place, a GPU would be idle for its host's sake.
    """
    reach = 1
    while reach < terms_BT.shape[1]:
        terms_BT = terms_BT + factors_BT * pad(terms_BT[:, reach:], (0, reach))
        factors_BT = factors_BT * pad(factors_BT[:, reach:], (0, reach))
        reach *= 2
    return terms_BT


@torch.no_grad()
def group_advantages(
    rewards_GN: Tensor, baseline: Baseline = "mean", scale: Scale = "std"
) -> Tensor:
    """Rewards against those of the other answers to the same prompt.

        mean            r_i − mean(r)                        GRPO (Shao et al. 2024)
        leave_one_out   r_i − mean_{j≠i}(r_j)                RLOO (Kool et al. 2019)
        none            r_i

    ``scale="std"`` divides by the group's √(biased variance + 1e-8), as GRPO does; "none" leaves
    the reward's unit, as Dr. GRPO does (Liu et al. 2025). A group of equal rewards has nothing to
    compare and gets exactly 0 from either baseline. (Scaling by std without a baseline divides by
    1e-4 there: keep a baseline.)

    Returns advantages_GN. Raises ValueError on another shape, an unknown option, or leave_one_out
    with a single sample a group.
    """
    check_axes(rewards_GN=rewards_GN)
    check_choice("baseline", baseline, get_args(Baseline))
    check_choice("scale", scale, get_args(Scale))
    n = rewards_GN.shape[1]
    if baseline == "leave_one_out" and n < 2:
        raise ValueError(
            f"leave_one_out needs at least 2 samples in a group, got shape "
            f"{tuple(rewards_GN.shape)}: sample more answers per prompt, or use baseline='none'"
        )
    # Counted from the group's first reward, so that equal rewards cancel without rounding.
    shifted_GN = rewards_GN - rewards_GN[:, :1]
    centred_GN = shifted_GN - shifted_GN.mean(1, keepdim=True)
    if baseline == "none":
        advantages_GN = rewards_GN
    else:  # leaving oneself out of the mean stretches the distance to it by n / (n − 1)
        advantages_GN = centred_GN * (n / (n - 1) if baseline == "leave_one_out" else 1)
    if scale == "none":
        return advantages_GN
    return advantages_GN * torch.rsqrt(centred_GN.square().mean(1, keepdim=True) + EPS)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(R − V) / Var(R) over the mask: 1 is a perfect critic, 0 one that knows the mean only.

    A scalar; 0 where the returns do not vary (or the mask is empty), as nothing is there to be
    explained. All three share one shape; ValueError otherwise.
    """
    spread = masked_var(returns, mask)
    rounding = (8 * torch.finfo(spread.dtype).eps) ** 2 * masked_mean(returns.square(), mask)
    unexplained = masked_var(returns - values, mask) / spread
    return torch.where(spread > rounding, 1 - unexplained, 0)
