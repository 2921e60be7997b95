"""A learner step from its first gradient on: epochs x minibatches of optimizer steps.

Each minibatch is cut into microbatches. A token's share of the loss (`algo.token_shares`) is
settled for the minibatch as a whole, so the gradients add up to the same however it was cut.

    loss = sum over tokens of share * (weight * objective + kl price * KL - bonus * entropy)
         + the critic's: sum over tokens of share * value loss
         + gamma * the language model's on SFT examples, where PPO-ptx asks for it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from distrl.algo import kl_estimate, token_shares, value_loss
from distrl.config import LearnConfig
from distrl.learn.experience import Experience
from distrl.learn.forward import (
    response_logprobs,
    response_states,
    response_values,
)
from distrl.learn.networks import Networks
from distrl.learn.objectives import Tokens, surrogate
from distrl.learn.opening import Opening
from distrl.learn.prepare import Prepared
from distrl.learn.ranks import ALONE, Load, Ranks
from distrl.models.crew import Gradients, hand_over

CPU = torch.device("cpu")


def minibatches(size: int, config: LearnConfig, seed: tuple[int, ...]) -> Iterator[Tensor]:
    """Row indices of each optimizer step: every epoch shuffles anew, by `seed` alone."""
    for epoch in range(config.epochs):
        order = np.random.default_rng((*seed, epoch)).permutation(size)
        for part in np.split(order, config.minibatches):
            yield torch.from_numpy(part)


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What changes from step to step.

    Attributes:
        kl: of a nat to the reference, where the leash is part of the loss; else 0.
        penalty: of a nat between old and new policy (`objective.kind=kl_penalty`).
        policy_learns: False while the critic warms up alone.
    """

    kl: float = 0.0
    penalty: float = 1.0
    policy_learns: bool = True


@dataclass(frozen=True, kw_only=True)
class MinibatchReport:
    """Sums over a minibatch by share; floats, the losses possibly not finite.

    Attributes:
        policy_loss: of the objective, KL price and entropy bonus included.
        clip_fraction, approx_kl, value_clip_fraction: means over kept tokens.
        padding: share of the passes' tokens that are none.
    """

    policy_loss: float = 0.0
    value_loss: float = 0.0
    clip_fraction: float = 0.0
    approx_kl: float = 0.0
    value_clip_fraction: float = 0.0
    padding: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Update:
    """What stays the same over a run: the networks and how they are trained.

    Attributes:
        longest: tokens that a response may have (`aggregate=constant`).
        ranks: that share the work; the gradients of all of them add up.
    """

    networks: Networks
    config: LearnConfig
    temperature: float
    longest: int
    ranks: Ranks = ALONE

    def backward(
        self,
        batch: Experience,
        prepared: Prepared,
        index: Tensor,
        prices: Prices,
        opening: Sequence[Opening] = (),
    ) -> MinibatchReport:
        """Add the gradients of one minibatch's loss. opening: its passes, where they were made."""
        whole = _Minibatch.of(batch, prepared, index, self.config.objective.aggregate, self.longest)
        padded = not self.networks.packed
        loads: list[Load] = [[(made.rows, True)] for made in opening]
        if not loads:
            budget = self.config.micro_tokens
            loads = self.ranks.loads(batch.lengths_B, index, budget, padded=padded)
        ways = self._ways(prices)

        def work(item: tuple[_Way, int]) -> tuple[Tensor, Gradients]:
            """One load's part of a way's gradient, and of each figure of the report."""
            way, turn = item
            gradients = Gradients(way.weights if len(loads) > 1 else None)
            sums = prepared.weights.new_zeros(len(fields(MinibatchReport)))
            for part, counts in loads[turn]:
                micro = whole.micro(part, counts, opening[turn] if opening else None)
                sums += way.back(micro, prices, gradients)
                if way is ways[0]:
                    read = micro.rows.ids_BL.numel() if padded else micro.rows.lengths_B.sum()
                    sums[-1] += read * counts
            return sums, gradients

        sums = prepared.weights.new_zeros(len(fields(MinibatchReport)))
        items = [(way, turn) for way in ways for turn in range(len(loads))]
        done = self.ranks.crew.run(work, items)
        for found, _ in done:
            sums += found
        for place in range(0, len(done), len(loads)):
            found = [gradients for _, gradients in done[place : place + len(loads)]]
            hand_over(found, self.ranks.crew)
        self.ranks.add(sums)
        sums[-1] = 1 - batch.lengths_B[index].sum() / sums[-1]
        return MinibatchReport(
            **dict(zip((f.name for f in fields(MinibatchReport)), sums.tolist(), strict=True))
        )

    @torch.no_grad()
    def moved(self, batch: Experience, prepared: Prepared) -> float:
        """KL(old || new) of the policy as it now is, nats a kept token (k3): one pass more."""
        means = token_shares(prepared.kept)
        budget, padded = self.config.micro_tokens, not self.networks.packed
        everyone = torch.arange(len(batch))
        loads = self.ranks.loads(batch.lengths_B, everyone, budget, padded=padded)

        def work(load: Load) -> Tensor:
            total = means.new_zeros(())
            for part, counts in load:
                rows = batch.rows(part)
                width = rows.tokens_BT.shape[1]
                new, _, _ = response_logprobs(
                    self.networks.policy, rows, self.temperature, with_entropy=False
                )
                gaps = kl_estimate(prepared.old[part, :width], new, "k3")
                total += (means[part, :width] * gaps).sum() * counts
            return total

        total = sum(self.ranks.crew.run(work, loads), means.new_zeros(()))
        self.ranks.add(total)
        return total.item()

    def _ways(self, prices: Prices) -> list[_Way]:
        """The ways back that a minibatch takes. A critic with a body of its own has its own: a
        thread that is done early takes on another load of either."""
        networks = self.networks
        weights = [list(part.parameters()) for part in networks.trained]
        if networks.shared:
            return [_Way(self._back_through_both, [w for part in weights for w in part])]
        ways = [_Way(self._back_through_policy, weights[0])] if prices.policy_learns else []
        if networks.critic is not None:
            ways.append(_Way(self._back_through_critic, weights[1]))
        return ways

    def _back_through_policy(self, micro: _Micro, prices: Prices, gradients: Gradients) -> Tensor:
        """The policy's gradients of one microbatch; its part of each figure of the report."""
        policy, clipped, moved, _ = self._policy_loss(micro, prices)
        gradients.backward(policy)
        return _figures(policy_loss=policy, clip_fraction=clipped, approx_kl=moved)

    def _back_through_critic(self, micro: _Micro, prices: Prices, gradients: Gradients) -> Tensor:
        value, clipped = self._value_loss(micro, None)
        gradients.backward(value)
        return _figures(value_loss=value, value_clip_fraction=clipped)

    def _back_through_both(self, micro: _Micro, prices: Prices, gradients: Gradients) -> Tensor:
        """Where the critic stands on the policy's body: one way back serves both."""
        if prices.policy_learns:
            policy, clipped, moved, states = self._policy_loss(micro, prices)
        else:
            policy = clipped = moved = micro.shares.new_zeros(())
            states = response_states(self.networks.policy, micro.rows)
        value, value_clipped = self._value_loss(micro, states)
        gradients.backward(policy + self.config.value.coef * value)
        return _figures(
            policy_loss=policy,
            clip_fraction=clipped,
            approx_kl=moved,
            value_loss=value,
            value_clip_fraction=value_clipped,
        )

    def _policy_loss(self, micro: _Micro, prices: Prices) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, share of clipped tokens, KL(proximal || new), and the policy's states."""
        config, known, made = self.config.objective, micro.known, micro.opening
        if made is not None:
            logprobs, entropy, states = made.logprobs, made.entropy, made.states
        else:
            logprobs, entropy, states = response_logprobs(
                self.networks.policy,
                micro.rows,
                self.temperature,
                with_entropy=config.entropy_bonus > 0,
            )
        tokens = Tokens(
            logprobs=logprobs,
            old=known.old,
            advantages=known.advantages,
            mask=known.kept,
            penalty=prices.penalty,
        )
        found = surrogate(tokens, config)
        per_token = known.weights * found.loss
        if config.entropy_bonus:
            per_token = per_token - config.entropy_bonus * entropy
        if prices.kl:
            kind = self.config.kl.estimator
            per_token = per_token + prices.kl * kl_estimate(logprobs, known.reference, kind)
        moved = kl_estimate(known.proximal, logprobs.detach(), "k3")
        return (
            (micro.shares * per_token).sum(),
            (micro.means * found.clipped).sum(),
            (micro.means * moved).sum(),
            states,
        )

    def _value_loss(self, micro: _Micro, states: Tensor | None) -> tuple[Tensor, Tensor]:
        """The critic's loss and its share of clipped tokens, both as token means."""
        critic, known, made = self.networks.critic, micro.known, micro.opening
        assert critic is not None
        values = None if made is None else made.values
        if values is None:
            values = response_values(critic, micro.rows, states)
        found = value_loss(values, known.values, known.returns, known.kept, self.config.value.clip)
        share = micro.means.sum()
        return found.loss * share, found.clip_fraction * share


def _figures(**known: Tensor) -> Tensor:
    """A microbatch's part of a `MinibatchReport`; 0 where nothing is known."""
    nothing = next(iter(known.values())).new_zeros(())
    return torch.stack([known.get(f.name, nothing).detach() for f in fields(MinibatchReport)])


@dataclass(frozen=True, slots=True)
class _Way:
    """A way back, and the weights whose gradients it finds."""

    back: Callable[[_Micro, Prices, Gradients], Tensor]
    weights: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class _Minibatch:
    """A batch with the share of each token in a minibatch's policy loss, and in a token mean; those
    of other minibatches have 0."""

    batch: Experience
    prepared: Prepared
    shares: Tensor
    means: Tensor

    @classmethod
    def of(
        cls,
        batch: Experience,
        prepared: Prepared,
        index: Tensor,
        aggregate: Literal["token", "sequence", "constant"],
        longest: int,
    ) -> _Minibatch:
        kept = prepared.kept[index]
        shares, means = (torch.zeros_like(prepared.weights) for _ in range(2))
        shares[index], means[index] = token_shares(kept, aggregate, longest), token_shares(kept)
        return cls(batch, prepared, shares, means)

    def micro(self, part: Tensor, counts: bool, opening: Opening | None) -> _Micro:
        rows = self.batch.rows(part)
        width = rows.tokens_BT.shape[1]
        return _Micro(
            rows,
            self.prepared.rows(part, width),
            self.shares[part, :width] * counts,
            self.means[part, :width] * counts,
            opening,
        )


@dataclass(frozen=True, slots=True)
class _Micro:
    """A microbatch: sequences, what is known of them, and the share of each of their tokens in the
    policy's loss and in a token mean; its passes, where they were made already."""

    rows: Experience
    known: Prepared
    shares: Tensor
    means: Tensor
    opening: Opening | None = None


def pretrain_backward(
    networks: Networks,
    examples: Sequence[Tensor],
    coef: float,
    micro_tokens: int,
    ranks: Ranks = ALONE,
    device: torch.device = CPU,
) -> float:
    """Add `coef` times the gradient of the mean token's -log p over whole examples (Ouyang et al.
    2022, eq. 2). examples: [L] ids each, at least two. device: where passes are made, which weights
    may wait elsewhere for. Returns that mean, nats a token."""
    lengths = torch.tensor([len(example) for example in examples])
    tokens = int((lengths - 1).sum())
    loads = ranks.loads(
        lengths, torch.arange(len(examples)), micro_tokens, padded=not networks.packed
    )

    def work(load: Load) -> tuple[Tensor, Gradients]:
        gradients = Gradients(list(networks.trained[0].parameters()) if len(loads) > 1 else None)
        total = torch.zeros((), device=device)
        for part, counts in load:
            ids = torch.nn.utils.rnn.pad_sequence(
                [examples[row] for row in part.tolist()], batch_first=True
            )
            chosen = torch.arange(ids.shape[1]) < (lengths[part] - 1)[:, None]
            ids, chosen = ids.to(device), chosen.to(device)
            _, logprobs, _ = networks.policy(ids, chosen, ids[:, 1:][chosen[:, :-1]])
            loss = -logprobs.sum() * counts / tokens
            gradients.backward(coef * loss)
            total += loss.detach()
        return total, gradients

    total = torch.zeros((), device=device)
    done = ranks.crew.run(work, loads)
    for found, _ in done:
        total += found
    hand_over([gradients for _, gradients in done], ranks.crew)
    ranks.add(total)
    return total.item()
