"""What crosses a process boundary: frozen, keyword-only records of numpy arrays.

The type tells the stage. A `Prompt` becomes a `Rollout`, a `Rollout` becomes a
`ScoredRollout`, B of those make a `RolloutBatch`, and a batch becomes a
`StepReport`. No record has a field that is filled in by a later stage.

A *group* is one prompt with its N samples; it is the unit of everything.
`GroupInfo` and `ScoredInfo` are the metadata of a group: all that the driver ever
sees. Tokens travel beside them as an opaque payload (`Parcel`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]
Int32s = NDArray[np.int32]
Float32s = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt to be rolled out.

    Attributes:
        index: place in the order of issue, from 0, never repeated within a run.
        epoch: pass over the data set, from 0.
        prompt_id: identity in the data set, the same in each epoch.
        text: what a person would read.
        token_ids: [P] int32, what the policy reads; never re-tokenised downstream.
        meta: further columns of the row (a reference answer, say), for rule rewards.
    """

    index: int
    epoch: int
    prompt_id: str
    text: str
    token_ids: Int32s
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionSpan:
    """Tokens `start` to `end` (exclusive) were sampled by policy `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One response.

    Attributes:
        text: the response alone, for display and for rewards that read text.
        token_ids: [T] int32 response tokens, the end-of-sequence token included.
        logprobs: [T] float32, nats, by the policy that sampled each token.
        spans: which version sampled which tokens; they cover 0..T without a gap.
        finish_reason: "stop" (the model ended it) or "length" (cut off).
    """

    text: str
    token_ids: Int32s
    logprobs: Float32s
    spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        if n == 0:
            raise ValueError("a sample needs at least one token")
        if len(self.logprobs) != n:
            raise ValueError(f"{n} tokens but {len(self.logprobs)} log-probabilities")
        edges = [0, *(span.end for span in self.spans)]
        if [s.start for s in self.spans] != edges[:-1] or edges[-1] != n:
            raise ValueError(f"version spans {self.spans} do not cover {n} tokens")

    def versions(self) -> Int32s:
        """[T] int32: the policy version that sampled each token."""
        out = np.empty(len(self.token_ids), dtype=np.int32)
        for span in self.spans:
            out[span.start : span.end] = span.version
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One prompt with its N samples, as the generator made them."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    generator: str

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError(f"rollout of prompt {self.prompt.prompt_id!r} has no samples")

    def nbytes(self) -> int:
        """Bytes of array payload (tokens and log-probabilities)."""
        return self.prompt.token_ids.nbytes + sum(
            s.token_ids.nbytes + s.logprobs.nbytes for s in self.samples
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A finished reward: `value` is the weighted sum of `parts` (before the KL leash); `merit` the
    same before the penalty of length (DAPO), None where there is none."""

    value: float
    parts: Mapping[str, float]
    merit: float | None = None

    def __post_init__(self) -> None:
        if not np.isfinite(self.value):
            raise ValueError(f"a score must be finite, got {self.value} from {dict(self.parts)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRollout:
    """A rollout with one score a sample."""

    rollout: Rollout
    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.rollout.samples):
            raise ValueError(f"{len(self.scores)} scores for {len(self.rollout.samples)} samples")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupInfo:
    """What the driver knows of a generated group: no tokens, no text.

    Attributes:
        spans: of each sample, which version sampled which tokens.
        seed: of the sampler that the group came from.
        seconds: how long generation took.
    """

    index: int
    prompt_id: str
    generator: str
    lengths: tuple[int, ...]
    spans: tuple[tuple[VersionSpan, ...], ...]
    finish_reasons: tuple[FinishReason, ...]
    nbytes: int
    seconds: float
    seed: int = 0

    @classmethod
    def of(cls, rollout: Rollout, seconds: float, seed: int = 0) -> GroupInfo:
        """The metadata of `rollout`."""
        return cls(
            index=rollout.prompt.index,
            prompt_id=rollout.prompt.prompt_id,
            generator=rollout.generator,
            lengths=tuple(len(s.token_ids) for s in rollout.samples),
            spans=tuple(s.spans for s in rollout.samples),
            finish_reasons=tuple(s.finish_reason for s in rollout.samples),
            nbytes=rollout.nbytes(),
            seconds=seconds,
            seed=seed,
        )

    @property
    def oldest_version(self) -> int:
        """Version of the oldest token."""
        return min(span.version for spans in self.spans for span in spans)

    @property
    def newest_version(self) -> int:
        """Version of the newest token."""
        return max(span.version for spans in self.spans for span in spans)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredInfo:
    """What the driver knows of a scored group: `rewards` are sums, `parts` what they are of, and
    `merits` the sums before the penalty of length; none where there is no such penalty."""

    group: GroupInfo
    rewards: tuple[float, ...]
    seconds: float
    scorer: str = ""
    parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    merits: tuple[float, ...] = ()

    @property
    def silent(self) -> bool:
        """Whether the group says nothing of what is better: all rewards are equal, or differ by
        the penalty of length alone."""
        return len(set(self.rewards)) == 1 or len(set(self.merits)) == 1


Info = TypeVar("Info", bound=GroupInfo | ScoredInfo)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parcel(Generic[Info]):
    """Metadata that the driver reads, and a payload that it only hands on.

    The payload is the record itself in one process, and a reference to it under Ray.
    """

    info: Info
    payload: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutBatch:
    """The groups of one learner step, in the order of issue."""

    groups: tuple[ScoredRollout, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise ValueError("a batch needs at least one group")


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A published set of weights: where it lies, and how to tell that it arrived.

    Attributes:
        version: the learner's version, 0 before the first update.
        transport: how it reaches an engine, as `sync.transport` says.
        locator: path of its image, for processes on the learner's machine.
        nbytes: size of all tensors.
        probe_ids: [K] int32, the canary's tokens.
        probe_logprobs: [K-1] float32: log p(probe_ids[1:]) under these weights.
    """

    version: int
    transport: str
    locator: str
    nbytes: int
    probe_ids: Int32s
    probe_logprobs: Float32s


@dataclass(frozen=True, kw_only=True, slots=True)
class Receiver:
    """The engine that a learner sends weights to, one tensor after another.

    Attributes:
        name: of its generator; start: how often that was started, this time included.
        workers: processes of the engine that take part.
        near: it is on the learner's machine.
        timeout_s: deadline of the rendezvous and a send together.
    """

    name: str
    start: int
    workers: int
    near: bool
    timeout_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One tensor of a set of weights; `dtype` as torch spells it ("bfloat16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """A version that the learner holds ready for one receiver, and where they meet.

    Attributes:
        host, port: where the learner waits. As long as they stay the same, so does the group.
        world: processes of the group: the learner (rank 0), then the engine's workers.
        tensors: in the order of sending.
    """

    host: str
    port: int
    world: int
    tensors: tuple[TensorInfo, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What a learner step did.

    Attributes:
        step: learner steps taken so far, this one included (1 after the first).
        version: the version of the weights that came of it.
        skipped: True where a non-finite loss or gradient kept the weights as they were.
        metrics: the names of `metrics/names.py` to finite numbers.
    """

    step: int
    version: int
    skipped: bool
    metrics: Mapping[str, float]
