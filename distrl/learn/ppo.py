"""Proximal policy optimisation on a batch of scored rollouts, the maths of one step.

Order of operations (Ouyang et al. 2022, appendix C; Ziegler et al. 2019):

1. proximal log-probabilities, reference log-probabilities and values, without gradient;
2. rewards: -beta * (log pi - log pi_ref) on each token, the score on the last one;
3. advantages and returns by GAE, advantages whitened over the batch;
4. importance weights from the behaviour policy (what sampled) to the proximal one (what
   the clip is around), truncated: Hilton et al. 2022, decoupled PPO;
5. epochs x minibatches of clipped policy loss and clipped value loss, each minibatch cut
   into microbatches whose gradients add up to the minibatch's token mean.

Left out on purpose: dropout is off (evaluation mode), as the ratio must be 1 at the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distrl.algo import (
    gae,
    importance_weights,
    masked_whiten,
    ppo_clip_loss,
    shape_rewards,
    value_loss,
)
from distrl.config import LearnConfig
from distrl.learn.experience import Experience, micro_batches
from distrl.learn.forward import response_logprobs, response_values
from distrl.models.heads import ScalarModel


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All [B, T], constants of the step, 0 on padding. `kept` is True on the tokens that reach the
    gradient: all response tokens but those that were too old."""

    kept: Tensor
    proximal: Tensor
    entropy: Tensor
    reference: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor

    def rows(self, index: Tensor, width: int) -> Prepared:
        """The sequences at `index`, cut to `width` response tokens."""
        return Prepared(**{f.name: getattr(self, f.name)[index, :width] for f in fields(self)})


@torch.no_grad()
def prepare(
    batch: Experience,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    critic: ScalarModel,
    config: LearnConfig,
    *,
    temperature: float,
    kl_coef: float,
    oldest: int = 0,
) -> Prepared:
    """Steps 1 to 4. Tokens of versions before `oldest` take part in all of them, and are only
    left out of step 5."""
    mask = batch.mask_BT
    proximal, entropy, ref, values = (torch.zeros_like(batch.behaviour_BT) for _ in range(4))
    for part in micro_batches(batch.lengths_B, torch.arange(len(batch)), config.micro_tokens):
        rows = batch.rows(part)
        width = rows.tokens_BT.shape[1]
        proximal[part, :width], entropy[part, :width] = response_logprobs(
            policy, rows, temperature, with_entropy=True
        )
        ref[part, :width], _ = response_logprobs(reference, rows, temperature, with_entropy=False)
        values[part, :width] = response_values(critic, rows)
    rewards = shape_rewards(batch.scores_B, proximal, ref, mask, kl_coef)
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    return Prepared(
        kept=mask & (batch.versions_BT >= oldest),
        proximal=proximal,
        entropy=entropy,
        reference=ref,
        values=values,
        advantages=advantages,
        returns=returns,
        weights=importance_weights(proximal, batch.behaviour_BT, mask, cap=config.importance_cap),
    )


def minibatches(size: int, config: LearnConfig, seed: tuple[int, ...]) -> Iterator[Tensor]:
    """Row indices of each optimizer step: every epoch shuffles anew, by `seed` alone."""
    for epoch in range(config.epochs):
        order = np.random.default_rng((*seed, epoch)).permutation(size)
        for part in np.split(order, config.minibatches):
            yield torch.from_numpy(part)


@dataclass(frozen=True, kw_only=True)
class MinibatchReport:
    """Token means over a minibatch; floats, the losses possibly not finite."""

    policy_loss: float
    value_loss: float
    clip_fraction: float
    approx_kl: float
    value_clip_fraction: float


def backward(
    batch: Experience,
    prepared: Prepared,
    index: Tensor,
    policy: PreTrainedModel,
    critic: ScalarModel,
    config: LearnConfig,
    temperature: float,
) -> MinibatchReport:
    """Add the gradients of one minibatch's token-mean losses, microbatch by microbatch.

    A microbatch's mean is weighted by its share of the minibatch's kept tokens, so the
    sum does not depend on how the minibatch was cut.
    """
    tokens = int(prepared.kept[index].sum())
    sums = torch.zeros(5)
    for part in micro_batches(batch.lengths_B, index, config.micro_tokens):
        rows = batch.rows(part)
        known = prepared.rows(part, rows.tokens_BT.shape[1])
        mask = known.kept
        share = int(mask.sum()) / tokens if tokens else 0.0
        logprobs, entropy = response_logprobs(
            policy, rows, temperature, with_entropy=config.entropy_bonus > 0
        )
        surrogate = ppo_clip_loss(
            logprobs,
            known.proximal,
            known.advantages,
            mask,
            config.clip,
            config.clip,
            weights_BT=known.weights,
        )
        loss = surrogate.loss
        if config.entropy_bonus > 0:
            loss = loss - config.entropy_bonus * entropy[mask].mean()
        (loss * share).backward()
        values = response_values(critic, rows)
        value = value_loss(values, known.values, known.returns, mask, config.value_clip)
        (value.loss * share).backward()
        sums += share * torch.tensor(
            [
                surrogate.loss.item(),
                value.loss.item(),
                surrogate.clip_fraction.item(),
                surrogate.approx_kl.item(),
                value.clip_fraction.item(),
            ]
        )
    return MinibatchReport(
        **dict(zip((f.name for f in fields(MinibatchReport)), sums.tolist(), strict=True))
    )
