"""One policy on held-out prompts: samples, their scores, their KL to the reference."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distrl.evaluate.judge import Judge
from distrl.evaluate.kl import response_kl
from distrl.evaluate.stats import Floats
from distrl.records import FinishReason, Parcel, Prompt, ScoredRollout
from distrl.roles import Generator, ScoreFailed, Scorer

KL_TOKENS = 8192
"""Tokens of a pass that KL is computed in, pads included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRow:
    """One response.

    Attributes:
        sample: its place among the samples of its prompt.
        reward: score by the run's reward, before the KL price.
        parts: the breakdown of `reward`.
        kl: log pi - log pi_ref summed over the response (nats); may be negative.
        length: response tokens.
        judge: the judge's number for prompt + response; None without a judge.
    """

    prompt_id: str
    sample: int
    prompt: str
    response: str
    reward: float
    parts: dict[str, float]
    kl: float
    length: int
    judge: float | None
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyEvaluation:
    """The responses of one policy, N to a prompt, prompt by prompt in the order given.

    Attributes:
        failed: id of each prompt without rows, as a reward failed on a sample, and why.
    """

    name: str
    samples_per_prompt: int
    rows: tuple[EvaluationRow, ...]
    failed: dict[str, str] = field(default_factory=dict)

    def column(self, name: str) -> Floats:
        """values_PN of a numeric field."""
        values = np.array([getattr(row, name) for row in self.rows], dtype=np.float64)
        return values.reshape(-1, self.samples_per_prompt)

    @property
    def has_judge(self) -> bool:
        return self.rows[0].judge is not None

    @property
    def prompt_ids(self) -> list[str]:
        """Identities of the prompts, in order."""
        return [row.prompt_id for row in self.rows[:: self.samples_per_prompt]]


async def evaluate_policy(
    name: str,
    policy: Path,
    reference: Path,
    generator: Generator,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    *,
    judge: Judge | None,
    temperature: float,
) -> PolicyEvaluation:
    """Sample, score and measure a policy on `prompts`.

    `generator` has to hold the weights of the checkpoint `policy` already: the caller loads
    them, so one engine serves several policies. `reference` is the checkpoint that KL is
    measured to. A payload may be the record itself or an awaitable of it (a reference to
    it on a cluster).

    A prompt that a reward fails on is left out, and `compare` leaves it out of the other policy's
    figures, too; ScoreFailed is raised where it fails on all. A prompt that cannot be generated
    raises RoleError. Raises ValueError on an empty list of prompts.
    """
    if not prompts:
        raise ValueError("no prompts to evaluate on")
    results = await asyncio.gather(*(_scored(generator, scorer, prompt) for prompt in prompts))
    scored = [result for result in results if not isinstance(result, ScoreFailed)]
    failed = {
        prompt.prompt_id: result
        for prompt, result in zip(prompts, results, strict=True)
        if isinstance(result, ScoreFailed)
    }
    if not scored:
        first = next(iter(failed.values()))
        raise ScoreFailed(f"{name}: no prompt of {len(prompts)} has a reward; the first: {first}")
    kl_PN = await asyncio.to_thread(
        response_kl,
        [group.rollout for group in scored],
        policy,
        reference,
        temperature=temperature,
        batch_tokens=KL_TOKENS,
    )
    rows = tuple(
        _row(group, sample, float(kl_PN[place, sample]), judge)
        for place, group in enumerate(scored)
        for sample in range(kl_PN.shape[1])
    )
    return PolicyEvaluation(
        name=name,
        samples_per_prompt=kl_PN.shape[1],
        rows=rows,
        failed={prompt_id: str(failure) for prompt_id, failure in failed.items()},
    )


async def _scored(
    generator: Generator, scorer: Scorer, prompt: Prompt
) -> ScoredRollout | ScoreFailed:
    generated = await generator.generate(prompt)
    try:
        parcel = await scorer.score(generated)
    except ScoreFailed as failure:
        return failure
    return await _payload(parcel)


async def _payload(parcel: Parcel[Any]) -> Any:
    return await parcel.payload if inspect.isawaitable(parcel.payload) else parcel.payload


def _row(group: ScoredRollout, place: int, kl: float, judge: Judge | None) -> EvaluationRow:
    prompt, sample = group.rollout.prompt, group.rollout.samples[place]
    score = group.scores[place]
    return EvaluationRow(
        prompt_id=prompt.prompt_id,
        sample=place,
        prompt=prompt.text,
        response=sample.text,
        reward=score.value,
        parts=dict(score.parts),
        kl=kl,
        length=len(sample.token_ids),
        judge=None if judge is None else judge(prompt.text + sample.text),
        finish_reason=sample.finish_reason,
    )
