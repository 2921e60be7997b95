"""Learning a reward from comparisons, putting it on a scale, and asking how sure it may be."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distrl.algo.checks import check_axes, check_range, check_same_shape
from distrl.algo.masked import masked_mean


def pairwise_loss(
    chosen_B: Tensor, rejected_B: Tensor, margin: float | Tensor | None = None
) -> Tensor:
    """−mean log σ(r_chosen − r_rejected − m)   (Stiennon et al. 2020; the margin m is that of
    Llama 2, Touvron et al. 2023, eq. 2).

    A scalar; 0 for no pairs. ``margin`` is a number or a tensor of B. Raises ValueError on shapes
    that do not fit.
    """
    check_axes(chosen_B=chosen_B, rejected_B=rejected_B)
    lead_B = chosen_B - rejected_B
    lead_B = lead_B - _margin_like(lead_B, margin)
    return masked_mean(-F.logsigmoid(lead_B), torch.ones_like(lead_B))


def ranking_loss(
    scores_K: Tensor, ranks_K: Tensor, margin_KK: float | Tensor | None = None
) -> Tensor:
    """The mean of −log σ(r_i − r_j − m_ij) over the pairs in which i ranks above j (InstructGPT,
    Ouyang et al. 2022, eq. 1).

    The K answers to one prompt, each scored once, are one element of a batch: their pairs are
    averaged together. Smaller ranks are better; ties make no pair and are not counted. With no pair
    left the loss is 0 and still in the graph. margin_KK[i, j] is what i has to lead j by. Raises
    ValueError on shapes that do not fit.
    """
    check_axes(scores_K=scores_K, ranks_K=ranks_K)
    lead_KK = scores_K.unsqueeze(1) - scores_K.unsqueeze(0)
    lead_KK = lead_KK - _margin_like(lead_KK, margin_KK)
    better_KK = ranks_K.unsqueeze(1) < ranks_K.unsqueeze(0)
    return masked_mean(-F.logsigmoid(lead_KK), better_KK)


def normalisation(raw: Tensor, mean: float = 0.0, std: float = 1.0) -> tuple[Tensor, Tensor]:
    """(gain, bias) such that gain · raw + bias has this mean and this (biased) standard deviation.

    raw holds a reward model's outputs on samples of the reference policy; Ziegler et al. 2019 put
    them at mean 0 and deviation 1 before RL, so that β means the same from one model to the next.
    Returns two scalars. Raises ValueError where raw is empty, constant or not finite, or std is not
    positive.
    """
    if not std > 0:
        raise ValueError(f"std must be positive; got {std}")
    if raw.numel() == 0 or not raw.isfinite().all() or raw.max() == raw.min():
        raise ValueError(
            f"raw {tuple(raw.shape)} must hold finite scores of which two differ: "
            f"score more reference samples"
        )
    gain = std / raw.std(correction=0)
    return gain, mean - gain * raw.mean()


def expected_calibration_error(prob: Tensor, label: Tensor, bins: int = 10) -> Tensor:
    """Σ_b (n_b / n) |mean probability − share of ones| over equal bins [k/bins, (k+1)/bins).

    prob and label (0 or 1) share one shape; probability 1 falls in the last bin. A scalar; 0 where
    they are empty. For a pair, prob is σ(r_a − r_b) and label says whether a was preferred. Raises
    ValueError on unequal shapes, bins below 1, or probabilities outside [0, 1].
    """
    check_same_shape(prob=prob, label=label)
    check_range("bins", bins, 1)
    if not ((prob >= 0) & (prob <= 1)).all():
        raise ValueError(f"prob must lie in [0, 1]; got {prob}")
    prob, label = prob.flatten(), label.flatten()
    bin_of = (prob * bins).long().clamp(max=bins - 1)
    excess = prob.new_zeros(bins).index_add(0, bin_of, prob - label.to(prob))
    return excess.abs().sum() / max(prob.numel(), 1)


def _margin_like(lead: Tensor, margin: float | Tensor | None) -> Tensor:
    margin = torch.as_tensor(0.0 if margin is None else margin).to(lead)
    if margin.ndim:
        check_same_shape(lead=lead, margin=margin)
    return margin
