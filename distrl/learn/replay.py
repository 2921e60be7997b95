"""Replay: a recorded run's batches to a new learner, step by step, to the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distrl.learn.learner import PolicyLearner
from distrl.learn.record import digest, recorded
from distrl.learn.spec import LearnerSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """How a replay went.

    Attributes:
        steps: steps taken.
        differs: the first step whose weights came out otherwise; None: all were equal.
        expected, found: digests (SHA-256 of policy and critic) after the last step taken.
    """

    steps: int
    differs: int | None
    expected: str
    found: str


def replay(
    spec: LearnerSpec,
    recording: Path,
    until: int | None = None,
    on_step: Callable[[int, bool], None] = lambda step, equal: None,
) -> Replayed:
    """Take the recorded steps, up to `until`, with a learner as it was at the start.

    Stops at the first step after which the weights differ: all later ones would. `on_step` is
    told of each step, and whether its weights are equal. Raises BadRecording.
    """
    learner = PolicyLearner(spec)
    steps, expected, found = 0, "", ""
    try:
        for kept in recorded(recording):
            if until is not None and kept.step > until:
                break
            learner.plan(kept.total_steps)
            learner.learn_from(kept.batch, kept.oldest)
            steps, expected = kept.step, kept.digest
            found = digest(*learner.networks.trained)
            on_step(steps, found == expected)
            if found != expected:
                return Replayed(steps=steps, differs=steps, expected=expected, found=found)
    finally:
        learner.close()
    return Replayed(steps=steps, differs=None, expected=expected, found=found)
