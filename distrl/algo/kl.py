"""How far the policy is from a reference, what that costs, and who sets the price."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from distrl.algo.checks import check_axes, check_choice, check_range, check_same_shape
from distrl.algo.masked import zero_outside

KLKind = Literal["k1", "k2", "k3"]

LOG_LIMIT = 20.0
"""Largest log-ratio that is exponentiated: e^20 is 5e8, and float32 overflows at e^88."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind = "k1") -> Tensor:
    """One-sample estimates of KL(π ‖ ref) from tokens drawn from π (Schulman 2020, "Approximating
    KL Divergence"). With d = logp_ref − logp:

        k1   −d               no bias, much variance, either sign
        k2   d² / 2           little bias while the two are near; its gradient has none
        k3   e^d − 1 − d      no bias, never negative

    Per token, of the inputs' common shape; average it with ``masked_mean``. There is no mask here,
    so NaN in padding becomes a NaN gradient: fill padding with numbers where this is a loss. In k3,
    d is held below 20. Raises ValueError on unequal shapes or an unknown kind.
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_choice("kind", kind, get_args(KLKind))
    d = ref_logprobs - logprobs
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d.square()
    d = d.clamp(max=LOG_LIMIT)
    return d.expm1() - d


@torch.no_grad()
def shape_rewards(
    scores_B: Tensor,
    logprobs_BT: Tensor,
    ref_logprobs_BT: Tensor,
    mask_BT: Tensor,
    kl_coef: float,
) -> Tensor:
    """r_t = −β (logp_t − logp_ref,t), with the sequence's score added on its last token.

    The per-token reward of Ziegler et al. 2019 and InstructGPT (Ouyang et al. 2022, eq. 2). "Last"
    is the last position the mask allows: the EOS where the response has one. Other places that
    claim 1 + last shift the score into the padding.

    Returns rewards_BT, 0 outside the mask, without gradients; a sequence without tokens has nowhere
    to put its score and stays 0. A score that is NaN stays NaN. Raises ValueError on shapes that do
    not fit.
    """
    check_axes(
        logprobs_BT=logprobs_BT,
        ref_logprobs_BT=ref_logprobs_BT,
        mask_BT=mask_BT,
        scores_B=scores_B,
    )
    tokens_from_here_BT = mask_BT.bool().flip(1).cumsum(1).flip(1)
    last_BT = mask_BT.bool() & (tokens_from_here_BT == 1)
    penalty_BT = kl_coef * kl_estimate(logprobs_BT, ref_logprobs_BT, "k1")
    return zero_outside(scores_B.unsqueeze(1), last_BT) - zero_outside(penalty_BT, mask_BT)


@dataclass(slots=True)
class AdaptiveKL:
    """β ← β (1 + clip(KL/target − 1, ±0.2) · n/horizon)   (Ziegler et al. 2019, section 2.2).

    The proportional controller of RLHF. PPO's own "adaptive KL" (2017, section 4) is another thing:
    it doubles or halves β, for the KL between successive policies. ``coef`` is the whole state;
    ``target`` is in nats a sequence, ``horizon`` in samples.
    """

    coef: float
    target: float = 6.0
    horizon: float = 10_000

    def __post_init__(self) -> None:
        check_range("coef", self.coef, 0)
        if not (self.target > 0 and self.horizon > 0):
            raise ValueError(f"target and horizon must be positive; got {self}")

    def update(self, kl: float | Tensor, n_samples: int) -> float:
        """Takes the mean KL a sequence over n_samples; stores and returns the new coefficient.

        Raises ValueError on a KL that is not finite, or on n_samples outside [0, 5 · horizon):
        beyond that one step could take the coefficient to zero, from where it never returns.
        """
        kl = float(kl)
        if not math.isfinite(kl):
            raise ValueError(f"kl must be finite; got {kl}")
        if not 0 <= n_samples < 5 * self.horizon:
            raise ValueError(
                f"n_samples must lie in [0, 5 * horizon = {5 * self.horizon}); got {n_samples}: "
                f"raise the horizon"
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n_samples / self.horizon
        return self.coef


@dataclass(frozen=True, slots=True)
class FixedKL:
    """β ← β: InstructGPT's choice, β = 0.02."""

    coef: float

    def __post_init__(self) -> None:
        check_range("coef", self.coef, 0)

    def update(self, kl: float | Tensor, n_samples: int) -> float:
        """Returns the coefficient, whatever was measured."""
        return self.coef


@dataclass(slots=True)
class LinearKL:
    """β from ``start`` to ``end`` along a straight line over ``samples``, and ``end`` after them.

    A leash that loosens (or tightens) by plan; ``seen`` is the whole state.
    """

    start: float
    end: float
    samples: int
    seen: int = 0

    def __post_init__(self) -> None:
        check_range("start", self.start, 0)
        check_range("end", self.end, 0)
        check_range("samples", self.samples, 1)

    @property
    def coef(self) -> float:
        return self.start + (self.end - self.start) * min(self.seen / self.samples, 1.0)

    def update(self, kl: float | Tensor, n_samples: int) -> float:
        """Returns the new coefficient, whatever was measured over n_samples."""
        self.seen += n_samples
        return self.coef


@dataclass(slots=True)
class AdaptivePenalty:
    """PPO's own adaptive KL (Schulman et al. 2017, section 4), for ``penalised_surrogate``:

        d < target / 1.5: β ← β / 2        d > 1.5 target: β ← 2 β

    d is KL(old ‖ new), nats a token, after an update; the new β serves the next one. Not the leash
    of RLHF, which is ``AdaptiveKL``. β stays within [1e-10, 1e10], from where it can come back.
    """

    coef: float = 1.0
    target: float = 0.01

    def __post_init__(self) -> None:
        if not (self.coef > 0 and self.target > 0):
            raise ValueError(f"coef and target must be positive; got {self}")

    def update(self, kl: float) -> float:
        """Stores and returns the new β. Raises ValueError on a KL that is not finite."""
        if not math.isfinite(kl):
            raise ValueError(f"kl must be finite; got {kl}")
        if kl < self.target / 1.5:
            self.coef = max(self.coef / 2, 1e-10)
        elif kl > self.target * 1.5:
            self.coef = min(self.coef * 2, 1e10)
        return self.coef
