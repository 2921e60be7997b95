"""What a batch says before anything is learnt from it: leash, critic, off-policyness."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from distrl.algo import (
    effective_sample_size,
    explained_variance,
    importance_ratio,
    kl_estimate,
    masked_mean,
)
from distrl.config import LearnConfig, ObjectiveConfig
from distrl.learn.experience import Experience
from distrl.learn.prepare import Prepared
from distrl.records import ScoredRollout


@torch.no_grad()
def measure(
    batch: Experience, prepared: Prepared, config: LearnConfig, version: int
) -> dict[str, float]:
    """Metrics of a batch at the learner's `version`, all finite.

    `kl/ref` is nats a response: the sum over its tokens of log pi - log pi_ref (k1).
    Ages are of the tokens that are kept. `mismatch/lag0_abs_mean` is over tokens of age 0 that the
    learner computed: there engine and learner hold the same weights, so any gap is numerical. No
    such token: no such metric. `ppo/ess` is of the ratios before anything is cut, and of a token's
    where none weighs: it says how far off the samples are, whatever is done about it.
    """
    mask = batch.mask_BT
    ages = (version - batch.versions_BT)[prepared.kept]
    metrics = {
        "ppo/entropy": masked_mean(prepared.entropy, prepared.computed).item(),
        "ppo/ess": effective_sample_size(_ratios(batch, prepared, config), mask).item(),
        "staleness/max": float(ages.max()) if len(ages) else 0.0,
        "staleness/mean": ages.float().mean().item() if len(ages) else 0.0,
    }
    if config.kl.used:
        kl_B = (kl_estimate(prepared.proximal, prepared.reference, "k1") * mask).sum(1)
        metrics["kl/ref"] = kl_B.mean().item()
    if config.has_critic:
        metrics["value/explained_variance"] = explained_variance(
            prepared.values, prepared.returns, mask
        ).item()
        metrics["value/mean"] = masked_mean(prepared.values, mask).item()
    if config.off_policy.weight != "none":
        metrics["ppo/capped"] = _capped(batch, prepared, config)
    fresh = prepared.computed & (batch.versions_BT == version)
    if fresh.any():
        gap = (prepared.proximal - batch.behaviour_BT).abs()
        metrics["mismatch/lag0_abs_mean"] = masked_mean(gap, fresh).item()
    return metrics


def _capped(batch: Experience, prepared: Prepared, config: LearnConfig) -> float:
    """Share of tokens whose importance weight was cut or rejected."""
    plain = _ratios(batch, prepared, config)
    return masked_mean((plain != prepared.weights).float(), batch.mask_BT).item()


def _ratios(batch: Experience, prepared: Prepared, config: LearnConfig) -> Tensor:
    """[B, T]: proximal over behaviour policy, as far as weights go."""
    mode = config.off_policy.weight
    return importance_ratio(
        prepared.proximal,
        batch.behaviour_BT,
        batch.mask_BT,
        "token" if mode == "none" else mode,
    )


@torch.no_grad()
def by_age(
    batch: Experience, prepared: Prepared, config: LearnConfig, version: int
) -> dict[str, float]:
    """How far each age of tokens is from the learner's policy (`metrics.names.BY_LAG`).

    The ratio r is of the proximal policy (the learner before its step) to the behaviour policy
    (the engine when it sampled). KL(behaviour || proximal) is estimated by r - 1 - log r on the
    behaviour policy's samples (k3, Schulman 2020): never negative, no bias. At lag 0 both hold
    the same weights: what is seen there is numerical, and what is seen beyond it is drift. Tokens
    whose log-probability was taken from the engine are left out. An objective without a clip has no
    share of tokens beyond it.
    """
    mask = prepared.computed
    log_ratio_N = (prepared.proximal - batch.behaviour_BT)[mask]
    ages_N = (version - batch.versions_BT)[mask]
    ratio_N = log_ratio_N.exp()
    objective = config.objective
    beyond_N = _beyond(batch, prepared, objective)[mask] if objective.has_clip else None
    out: dict[str, float] = {}
    for age in ages_N.unique().tolist():
        mine = ages_N == age
        ratio = ratio_N[mine]
        figures = {
            "tokens": float(mine.sum()),
            "kl": (ratio - 1 - log_ratio_N[mine]).mean().item(),
            "ess": effective_sample_size(ratio[None], torch.ones_like(ratio)[None]).item(),
            "ratio_mean": ratio.mean().item(),
        }
        if beyond_N is not None:
            figures["clip_fraction"] = beyond_N[mine].float().mean().item()
        out |= {f"offpolicy/{name}/lag{age}": value for name, value in figures.items()}
    return out


def _beyond(batch: Experience, prepared: Prepared, objective: ObjectiveConfig) -> Tensor:
    """[B, T] bool: whether the objective's bounds are passed before the step begins."""
    mode = "geometric" if objective.kind == "sequence" else "token"
    ratio_BT = importance_ratio(prepared.proximal, batch.behaviour_BT, batch.mask_BT, mode)
    return (ratio_BT < 1 - objective.clip_low) | (ratio_BT > 1 + objective.clip_high)


def part_means(groups: Sequence[ScoredRollout]) -> dict[str, float]:
    """`reward/<component>`: the mean of each part of the reward over all samples."""
    scores = [score for group in groups for score in group.scores]
    return {f"reward/{name}": fmean(s.parts[name] for s in scores) for name in scores[0].parts}
