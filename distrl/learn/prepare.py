"""What a learner step knows before its first gradient.

Order of operations (Ouyang et al. 2022, appendix C; Ziegler et al. 2019):

1. proximal log-probabilities (the learner's before the step), reference log-probabilities, values,
   each in one pass without gradient, and none that nobody asks for or that the first minibatch
   has made already (`opening.py`);
2. rewards: the score on the last token, and -beta * (log pi - log pi_ref) on each one where the
   leash is part of the reward;
3. advantages, and returns where there is a critic (`advantages.py`);
4. importance weights from the behaviour policy (what sampled) to the proximal one (what
   the clip is around), truncated: Hilton et al. 2022, decoupled PPO.

`update.py` goes on from here. Left out on purpose: dropout is off (evaluation mode), as the ratio
must be 1 at the start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from distrl.algo import importance_weights, shape_rewards
from distrl.config import LearnConfig
from distrl.learn.advantages import Advantages, Outcome, estimate
from distrl.learn.experience import Experience
from distrl.learn.forward import (
    PolicyModel,
    response_logprobs,
    response_states,
    response_values,
)
from distrl.learn.networks import Networks
from distrl.learn.opening import Opening
from distrl.learn.ranks import ALONE, Load, Ranks

log = logging.getLogger(__name__)

CHECKED = 16
"""With trust in the engine's log-probabilities, every sixteenth sequence is computed."""

TOLERANCE = 1e-3
"""Largest mean gap (nats) to the engine's log-probabilities at which they are trusted."""


Found = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Proximal log-probabilities, entropy, reference log-probabilities, values."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All [B, T], constants of the step, 0 on padding.

    Attributes:
        kept: True on the tokens that reach the gradient: all response tokens but those that
            were too old.
        computed: True on the tokens whose proximal log-probability and entropy the learner
            computed, and did not take from the engine.
        old: the log-probabilities that ratios are taken from (`off_policy.anchor`).
        values, returns: 0 where there is no critic.
    """

    kept: Tensor
    computed: Tensor
    proximal: Tensor
    entropy: Tensor
    reference: Tensor
    old: Tensor
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
    networks: Networks,
    config: LearnConfig,
    *,
    temperature: float,
    kl_coef: float,
    version: int = 0,
    oldest: int = 0,
    opening: Sequence[Opening] = (),
    ranks: Ranks = ALONE,
) -> Prepared:
    """Steps 1 to 4, for a learner at `version`. Tokens of versions before `oldest` take part in all
    of them, and are only left out of the gradient. What is in `opening` is not computed again."""
    mask = batch.mask_BT
    passes = _Passes(batch, networks, config, temperature, ranks)
    passes.run(version, opening)
    priced = kl_coef if config.kl.place == "reward" else 0.0
    rewards = shape_rewards(batch.scores_B, passes.proximal, passes.reference, mask, priced)
    found = _advantages(rewards, passes.values, batch, config)
    off = config.off_policy
    if off.weight == "none":
        weights = mask.to(passes.proximal.dtype)
    else:
        weights = importance_weights(
            passes.proximal,
            batch.behaviour_BT,
            mask,
            mode=off.weight,
            cap=off.cap,
            reject=off.reject,
            floor=off.floor,
        )
    return Prepared(
        kept=mask & (batch.versions_BT >= oldest),
        computed=passes.computed,
        proximal=passes.proximal,
        entropy=passes.entropy,
        reference=passes.reference,
        old=passes.proximal if off.anchor == "proximal" else batch.behaviour_BT,
        values=passes.values,
        advantages=found.advantages,
        returns=torch.zeros_like(passes.values) if found.returns is None else found.returns,
        weights=weights,
    )


def _advantages(
    rewards: Tensor, values: Tensor, batch: Experience, config: LearnConfig
) -> Advantages:
    outcome = Outcome(
        rewards_BT=rewards,
        values_BT=values if config.has_critic else None,
        mask_BT=batch.mask_BT,
        samples=batch.samples,
    )
    return estimate(outcome, config.advantage)


class _Passes:
    """Step 1: every network reads every sequence at most once."""

    def __init__(
        self,
        batch: Experience,
        networks: Networks,
        config: LearnConfig,
        temperature: float,
        ranks: Ranks,
    ) -> None:
        self.batch, self.networks, self.config, self.ranks = batch, networks, config, ranks
        self.temperature = temperature
        self.proximal, self.entropy, self.reference, self.values = (
            torch.zeros_like(batch.behaviour_BT) for _ in range(4)
        )
        self.computed = batch.mask_BT.clone()

    def run(self, version: int, opening: Sequence[Opening]) -> None:
        rest = torch.ones(len(self.batch), dtype=torch.bool)
        for made in opening:
            rest[made.rows] = False
            self._take(made)
        if opening:
            self._read(~rest, policy=False, values=False)
        if not self.config.trust_engine_logprobs:
            self._read(rest)
            return
        fresh = self.computed & (self.batch.versions_BT == version)
        trusted = self._trusted(version) & rest
        if not fresh[~rest].any():  # nothing has been computed that could tell
            trusted[trusted.nonzero()[::CHECKED]] = False
        self._read(rest & ~trusted)
        self._read(trusted, policy=False)
        self.computed[trusted] = False
        gap = (self.proximal - self.batch.behaviour_BT)[fresh & self.computed].abs()
        if gap.numel() and not gap.mean().item() <= TOLERANCE:
            log.warning(
                "the engine's log-probabilities are %.1e nats off the learner's in the mean, so "
                "they are computed anew; learn.trust_engine_logprobs saves nothing here",
                gap.mean().item(),
            )
            self.computed[trusted] = self.batch.mask_BT[trusted]
            self._read(trusted, reference=False, values=False)
        else:
            self.proximal[trusted] = self.batch.behaviour_BT[trusted] * self.batch.mask_BT[trusted]

    def _take(self, made: Opening) -> None:
        """What a pass of the first minibatch found; the reference has not read it yet."""
        width = made.logprobs.shape[1]
        self.proximal[made.rows, :width] = made.logprobs.detach()
        self.entropy[made.rows, :width] = made.entropy.detach()
        if made.values is not None:
            self.values[made.rows, :width] = made.values.detach()

    def _trusted(self, version: int) -> Tensor:
        """[B]: sequences of the learner's own version."""
        fresh = (self.batch.versions_BT == version) | ~self.batch.mask_BT
        return fresh.all(1).cpu()

    def _read(
        self, wanted_B: Tensor, *, policy: bool = True, reference: bool = True, values: bool = True
    ) -> None:
        """Each of these networks, as far as it is there, on the sequences that are wanted, shared
        out among ranks and threads. A critic on the policy's body needs the policy's pass in any
        case. A reference that is the policy without its adapter has the weights to itself.
        """
        index = wanted_B.nonzero().squeeze(1)
        networks = self.networks
        values = values and networks.critic is not None
        reference = reference and self.config.kl.used
        reads = []
        if networks.shared and values:
            reads.append(partial(self._own, policy=policy, values=True))
        else:
            reads += [partial(self._own, policy=True, values=False)] if policy else []
            reads += [partial(self._own, policy=False, values=True)] if values else []
        if reference and networks.reference is not None:
            reads.append(partial(self._told, networks.reference))
        self._share_out(index, reads)
        if reference and networks.reference is None:
            with networks.as_reference() as other:
                self._share_out(index, [partial(self._told, other)])

    def _share_out(self, index: Tensor, reads: Sequence[Callable[[Experience], Found]]) -> None:
        """Add what each of `reads` finds of the sequences at `index`."""
        if not len(index) or not reads:
            return
        kept = (self.proximal, self.entropy, self.reference, self.values)
        found = [torch.zeros_like(tensor) for tensor in kept]
        padded = not self.networks.packed

        def work(item: tuple[Callable[[Experience], Found], Load]) -> None:
            read, load = item
            for part, counts in load:
                rows = self.batch.rows(part)
                width = rows.tokens_BT.shape[1]
                for tensor, numbers in zip(found, read(rows), strict=True):
                    if counts and numbers is not None:
                        tensor[part, :width] = numbers

        budget = self.config.micro_tokens
        loads = self.ranks.loads(self.batch.lengths_B, index, budget, padded=padded)
        self.ranks.crew.run(work, [(read, load) for read in reads for load in loads])
        self.ranks.add(*found)
        for tensor, numbers in zip(kept, found, strict=True):
            tensor += numbers

    def _own(self, rows: Experience, *, policy: bool, values: bool) -> Found:
        networks = self.networks
        shared = networks.shared and values
        proximal = entropy = numbers = states = None
        if policy:
            proximal, entropy, states = response_logprobs(
                networks.policy, rows, self.temperature, with_entropy=True
            )
        elif shared:
            states = response_states(networks.policy, rows)
        if networks.critic is not None and values:
            numbers = response_values(networks.critic, rows, states if shared else None)
        return proximal, entropy, None, numbers

    def _told(self, reference: PolicyModel, rows: Experience) -> Found:
        logprobs, _, _ = response_logprobs(reference, rows, self.temperature, with_entropy=False)
        return None, None, logprobs, None
