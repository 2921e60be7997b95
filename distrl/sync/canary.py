"""Published weights, with the proof that they arrived: log-probabilities on a fixed probe.

Checksums of an engine's tensors do not see a tied output head that stayed behind, nor a
layer that was packed wrongly for its kernels; what the engine computes shows both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from distrl.records import Float32s, Int32s, Weights
from distrl.sync.memory import Bystander, SharedMemoryPublisher, Weight

Together = Callable[[Sequence[Callable[[], Any]]], list[Any]]
"""What makes some calls, at the same time if it can, and has their results in order."""


def in_turn(work: Sequence[Callable[[], Any]]) -> list[Any]:
    """One call after the other."""
    return [call() for call in work]


def publish(
    state: Mapping[str, Weight],
    publisher: SharedMemoryPublisher | Bystander,
    *,
    version: int,
    transport: str = "shm",
    probe: Int32s,
    read: Callable[[Int32s], Float32s],
    together: Together = in_turn,
) -> Weights:
    """Put a causal language model's weights into shared memory.

    state: the weights under the engine's names. transport: how they go on from there; what
    travels is always the image that was checked here. probe: `probe_ids`. read: the model's
    log-probabilities on them, as `probe_logprobs` gives them. together: weights are written while
    the model reads, where it has threads for both. Raises NonFiniteWeights.
    """
    (locator, nbytes), logprobs = together(
        [partial(publisher.publish, state, version), partial(read, probe)]
    )
    return Weights(
        version=version,
        transport=transport,
        locator=locator,
        nbytes=nbytes,
        probe_ids=probe,
        probe_logprobs=logprobs,
    )


def publish_model(
    model: Any,
    publisher: SharedMemoryPublisher,
    *,
    version: int,
    vocab: int,
    probe_tokens: int,
    state: Mapping[str, Weight] | None = None,
    together: Together = in_turn,
) -> Weights:
    """`publish` of a model of transformers, on a probe of the first `vocab` ids. state: its
    weights, where an engine knows them by other names than the model does."""
    return publish(
        model.state_dict() if state is None else state,
        publisher,
        version=version,
        probe=probe_ids(vocab, probe_tokens),
        read=partial(probe_logprobs, model),
        together=together,
    )


def probe_ids(vocab: int, tokens: int) -> Int32s:
    """[K] int32: ids spread over the whole vocabulary, the same in every run."""
    return np.random.default_rng(0).integers(0, vocab, tokens, dtype=np.int32)


@torch.no_grad()
def probe_logprobs(model: Any, probe: Int32s) -> Float32s:
    """[K-1] float32: log p(probe[1:]), nats, at temperature 1, by a model of transformers."""
    ids = torch.from_numpy(probe).long().to(model.device)
    logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits.float(), dim=-1).gather(1, ids[1:, None])
    return logprobs[:, 0].cpu().numpy()
