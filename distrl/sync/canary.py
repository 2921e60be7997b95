"""Published weights, with the proof that they arrived: log-probabilities on a fixed probe.

Checksums of an engine's tensors do not see a tied output head that stayed behind, nor a
layer that was packed wrongly for its kernels; what the engine computes shows both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from distrl.records import Float32s, Int32s, Weights
from distrl.sync.memory import SharedMemoryPublisher, checkpoint_tensors


def publish(
    model: Any,
    publisher: SharedMemoryPublisher,
    *,
    version: int,
    vocab: int,
    probe_tokens: int,
    state: Mapping[str, torch.Tensor] | None = None,
) -> Weights:
    """Put a Hugging Face causal model's weights into shared memory.

    vocab: ids that the tokenizer knows; the probe is drawn from them. state: the weights under
    the engine's names, where the model has others (adapters merged).
    Raises NonFiniteWeights.
    """
    tensors = checkpoint_tensors(model.state_dict() if state is None else state)
    locator, nbytes = publisher.publish(tensors, version)
    probe = probe_ids(vocab, probe_tokens)
    return Weights(
        version=version,
        transport="shm",
        locator=locator,
        nbytes=nbytes,
        probe_ids=probe,
        probe_logprobs=probe_logprobs(model, probe),
    )


def probe_ids(vocab: int, tokens: int) -> Int32s:
    """[K] int32: ids spread over the whole vocabulary, the same in every run."""
    return np.random.default_rng(0).integers(0, vocab, tokens, dtype=np.int32)


@torch.no_grad()
def probe_logprobs(model: Any, probe: Int32s) -> Float32s:
    """[K-1] float32: log p(probe[1:]), nats, at temperature 1."""
    ids = torch.from_numpy(probe).long().to(model.device)
    logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits.float(), dim=-1).gather(1, ids[1:, None])
    return logprobs[:, 0].cpu().numpy()
