"""From vLLM's request output to a `Rollout`, token by token and never through text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import numpy as np

from distrl.records import Prompt, Rollout, Sample, VersionSpan

if TYPE_CHECKING:
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput, RequestOutput

Decode = Callable[[list[list[int]]], list[str]]
"""Token ids of several responses to their texts, special tokens left out."""


class IncompleteOutput(Exception):
    """The engine ended a request without a proper response (an abort, no tokens)."""


def to_rollout(output: RequestOutput, prompt: Prompt, generator: str, decode: Decode) -> Rollout:
    """The group behind a finished request.

    Raises IncompleteOutput where a sample was aborted, is empty or has no version.
    """
    ordered = sorted(output.outputs, key=lambda completion: completion.index)
    texts = decode([list(completion.token_ids) for completion in ordered])
    samples = tuple(_sample(c, text) for c, text in zip(ordered, texts, strict=True))
    return Rollout(prompt=prompt, samples=samples, generator=generator)


def _sample(completion: CompletionOutput, text: str) -> Sample:
    if completion.finish_reason not in ("stop", "length") or not completion.token_ids:
        raise IncompleteOutput(
            f"finish_reason={completion.finish_reason!r} after {len(completion.token_ids)} tokens"
        )
    if not completion.weight_versions:
        raise IncompleteOutput("the engine reported no weight versions")
    return Sample(
        text=text,
        token_ids=np.asarray(completion.token_ids, dtype=np.int32),
        logprobs=_sampled_logprobs(completion),
        spans=tuple(
            VersionSpan(version=int(span.version), start=span.start, end=span.end)
            for span in completion.weight_versions
        ),
        finish_reason=completion.finish_reason,
    )


def _sampled_logprobs(completion: CompletionOutput) -> np.ndarray:
    """[T] float32: what the engine says of each token that it sampled."""
    flat = cast("FlatLogprobs | None", completion.logprobs)  # flat_logprobs asks for it
    return token_logprobs(flat, np.asarray(completion.token_ids))


def token_logprobs(flat: FlatLogprobs | None, token_ids: np.ndarray) -> np.ndarray:
    """[T] float32 log p(token) out of vLLM's flat table.

    The table may list further candidates at a position; the token itself comes first.
    Raises IncompleteOutput where the table is missing or speaks of other tokens.
    """
    if flat is None:
        raise IncompleteOutput("the engine reported no log-probabilities")
    first = np.asarray(flat.start_indices, dtype=np.int64)
    if not np.array_equal(np.asarray(flat.token_ids)[first], token_ids):
        raise IncompleteOutput("the engine's log-probabilities are of other tokens")
    return np.asarray(flat.logprobs, dtype=np.float32)[first]
