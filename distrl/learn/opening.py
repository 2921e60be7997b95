"""The first minibatch's passes, made before anything else of a step and kept for its way back.

Its weights are those that the step begins with, so the log-probabilities and values that `prepare`
wants of these sequences are the very numbers that the first gradient sets out from: one pass of
policy and critic serves both. Of E epochs of M minibatches that is one pass of M + E * M; where
there is one epoch of one minibatch, `prepare` has nothing left to compute but the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distrl.learn.experience import Experience
from distrl.learn.forward import response_logprobs, response_values
from distrl.learn.networks import Networks
from distrl.learn.ranks import Load, Ranks


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
    """The passes over the minibatch `index`, one of each thread (and another by a critic with a
    body of its own); none where it takes more: what a way back needs is held for one at a time."""
    padded = not networks.packed
    loads = ranks.loads(batch.lengths_B, index, micro_tokens, padded=padded)
    if any(len(load) > 1 for load in loads):
        return []
    on_body = networks.critic if networks.shared else None
    apart = None if networks.shared else networks.critic

    def read(load: Load) -> Opening:
        part = batch.rows(load[0][0])
        logprobs, entropy, states = response_logprobs(
            networks.policy, part, temperature, with_entropy=True
        )
        values = None if on_body is None else response_values(on_body, part, states)
        return Opening(
            rows=load[0][0], logprobs=logprobs, entropy=entropy, states=states, values=values
        )

    work: list[Callable[[], Any]] = [partial(read, load) for load in loads]
    if apart is not None:
        work += [partial(response_values, apart, batch.rows(load[0][0])) for load in loads]
    done = ranks.crew.together(work)
    openings, values = done[: len(loads)], done[len(loads) :]
    if apart is None:
        return openings
    return [replace(made, values=found) for made, found in zip(openings, values, strict=True)]
