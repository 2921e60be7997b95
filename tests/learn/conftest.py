"""Small batches of scored rollouts, made by hand or by the policy itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike

from distrl.config import LearnConfig
from distrl.learn.learner import PolicyLearner
from distrl.learn.spec import LearnerSpec, Place
from distrl.records import Prompt, Rollout, Sample, Score, ScoredRollout, VersionSpan


def sample(ids: ArrayLike, logprobs: ArrayLike) -> Sample:
    tokens = np.asarray(ids, dtype=np.int32)
    return Sample(
        text="",
        token_ids=tokens,
        logprobs=np.asarray(logprobs, dtype=np.float32),
        spans=(VersionSpan(version=0, start=0, end=len(tokens)),),
        finish_reason="stop" if tokens[-1] == 2 else "length",
    )


def group(
    prompt: ArrayLike, samples: Sequence[Sample], scores: Sequence[float], index: int
) -> ScoredRollout:
    ids = np.asarray(prompt, dtype=np.int32)
    asked = Prompt(index=index, epoch=0, prompt_id=f"p{index}", text="", token_ids=ids)
    rollout = Rollout(prompt=asked, samples=tuple(samples), generator="g0")
    return ScoredRollout(
        rollout=rollout,
        scores=tuple(Score(value=value, parts={"liked": value}) for value in scores),
    )


@pytest.fixture(scope="session")
def make_groups() -> Callable[..., list[ScoredRollout]]:
    """`make_groups(seed, groups, samples)`: random tokens, lengths, scores and log-probabilities.

    Padding (0) and end (2) ids occur inside prompts and responses, where they are plain tokens.
    """

    def make(seed: int, groups: int = 4, samples: int = 3) -> list[ScoredRollout]:
        rng = np.random.default_rng(seed)
        out = []
        for index in range(groups):
            lengths = rng.integers(1, 12, samples)
            rows = [rng.integers(0, 300, n) for n in lengths]
            for row in rows[::2]:
                row[-1] = 2
            answers = [sample(row, -5.7 + 0.1 * rng.normal(size=len(row))) for row in rows]
            prompt = rng.integers(0, 300, rng.integers(1, 9))
            out.append(group(prompt, answers, rng.normal(size=samples).tolist(), index))
        return out

    return make


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


QUICK = {"lr": 1e-3, "critic_lr": 1e-3, "warmup_steps": 0, "minibatches": 2}


@pytest.fixture
def new_learner(tiny_policy, tmp_path):
    made = []

    def make(
        examples=None,
        total_steps: int = 10,
        threads: int | None = 1,
        place: Place | None = None,
        **config,
    ) -> PolicyLearner:
        spec = LearnerSpec(
            policy=tiny_policy,
            reward_model=None,
            config=LearnConfig.model_validate(QUICK | config),
            total_steps=total_steps,
            total_samples=12 * total_steps,
            longest=12,
            temperature=1.0,
            seed=3,
            canary_tokens=8,
            scratch=tmp_path / "scratch",
            pretrain=examples,
            threads=threads,
            place=place,
        )
        made.append(PolicyLearner(spec))
        return made[-1]

    yield make
    for learner in made:
        learner.close()
