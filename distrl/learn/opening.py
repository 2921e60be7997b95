"""The first minibatch's passes, made before anything else of a step and kept for its way back.

Its weights are those that the step begins with, so the log-probabilities and values that `prepare`
wants of these sequences are the very numbers that the first gradient sets out from: one pass of
policy and critic serves both. Of E epochs of M minibatches that is one pass of M + E * M; where
there is one epoch of one minibatch, `prepare` has nothing left to compute but the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distrl.learn.experience import Experience
from distrl.learn.forward import response_logprobs, response_values
from distrl.learn.networks import Networks
from distrl.learn.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A pass over the sequences `rows`, in that order, in the graph of the weights as they are.

    Attributes:
        logprobs, entropy: [b, t], nats, 0 on padding; t is the longest response among them.
        states: [N, D], of the N response tokens.
        values: [b, t]; None where there is no critic.
    """

    rows: Tensor
    logprobs: Tensor
    entropy: Tensor
    states: Tensor
    values: Tensor | None


@torch.enable_grad()
def read_opening(
    batch: Experience,
    index: Tensor,
    networks: Networks,
    temperature: float,
    micro_tokens: int,
    ranks: Ranks,
) -> list[Opening]:
    """The passes over the minibatch `index`, one of each thread; none where it takes more: what a
    way back needs is held for one pass at a time."""
    padded = not networks.packed
    loads = ranks.loads(batch.lengths_B, index, micro_tokens, padded=padded)
    if any(len(load) > 1 for load in loads):
        return []
    critic = networks.critic
    parts = [batch.rows(load[0][0]) for load in loads]

    def policy(part: Experience) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        read = response_logprobs(networks.policy, part, temperature, with_entropy=True)
        if critic is None or not networks.shared:
            return (*read, None)
        return (*read, response_values(critic, part, read[-1]))

    work: list[Callable[[], Any]] = [partial(policy, part) for part in parts]
    if critic is not None and not networks.shared:
        work += [partial(response_values, critic, part) for part in parts]
    done = ranks.crew.run(lambda each: each(), work)
    found, apart = done[: len(parts)], done[len(parts) :] or [None] * len(parts)
    return [
        Opening(
            rows=load[0][0],
            logprobs=logprobs,
            entropy=entropy,
            states=states,
            values=shared if values is None else values,
        )
        for load, (logprobs, entropy, states, shared), values in zip(
            loads, found, apart, strict=True
        )
    ]
