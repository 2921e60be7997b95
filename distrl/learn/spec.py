"""What a learner is made from. Apart from it, so that who places it need not load torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distrl.config import LearnConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One process's place among those that share a learner (`ranks.py`).

    Attributes:
        rank: its number, from 0; world: how many there are.
        address: host:port at which rank 0 waits for the others.
        timeout_s: how long one waits for another.
    """

    rank: int = 0
    world: int = 1
    address: str = ""
    timeout_s: float = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerSpec:
    """What a learner needs to know.

    Attributes:
        policy: Hugging Face folder that the policy starts from; also the frozen reference.
        reward_model: folder that the critic starts from; None: from the policy's body.
        config: the `learn` section.
        total_steps, total_samples: of the run, for schedules.
        longest: tokens that a response may have.
        temperature: of sampling; log-probabilities are of logits / temperature.
        canary_tokens: length of the probe that proves a sync.
        transport: how published weights are to travel (`sync.transport`).
        scratch: folder where the batch of a non-finite step is kept.
        recording: folder where every step is recorded for a replay; None: nowhere.
        pretrain: examples for PPO-ptx (`pretrain.py`); None: no such gradient.
        threads: CPU threads; None leaves torch's choice.
        place: among the processes that share the learner; None: alone.
    """

    policy: Path
    reward_model: Path | None
    config: LearnConfig
    total_steps: int
    total_samples: int
    longest: int
    temperature: float
    seed: int
    canary_tokens: int
    scratch: Path
    recording: Path | None = None
    pretrain: Path | None = None
    transport: str = "shm"
    threads: int | None = None
    place: Place | None = None
