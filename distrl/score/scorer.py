"""The scorer role in one process: requests gather while a batch is being scored.

    score()   appends to the queue, waits for its own answer under a deadline
    _drain()  one at a time: takes all that waits → scores it in a thread → answers each

So the event loop stays free, a lone request is scored at once, and under load requests
share forward passes without a timer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from distrl.config import ScoreConfig
from distrl.models.crew import ALONE, Crew
from distrl.records import GroupInfo, Parcel, Rollout, ScoredInfo, ScoredRollout
from distrl.roles import ScoreFailed
from distrl.score.compose import RewardSum


@dataclass(frozen=True, eq=False)
class _Request:
    rollout: Rollout
    answer: asyncio.Future[ScoredRollout]


class LocalScorer:
    """`roles.Scorer` on rollouts held in this process."""

    def __init__(
        self,
        config: ScoreConfig,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "scorer-0",
        *,
        rewards: RewardSum | None = None,
        crew: Crew = ALONE,
    ) -> None:
        """`config.parts` must name the parts (`with_default_part`); `tokenizer` is the policy's.
        `crew` shares the passes of reward models. `rewards` stands in for what the config names.
        Raises ConfigError, ModelError."""
        self.name = name
        self._rewards = rewards or RewardSum.of(config, tokenizer, crew)
        self._timeout_s = config.timeout_s
        self._waiting: list[_Request] = []
        self._being_scored: list[_Request] = []
        self._drain_task: asyncio.Task[None] | None = None

    async def score(self, group: Parcel[GroupInfo]) -> Parcel[ScoredInfo]:
        """Score one group; many calls may be in flight. The payload is a `Rollout`, and comes
        back as a `ScoredRollout`.

        Raises ScoreFailed: a part failed, or there was no answer within `score.timeout_s`.
        """
        start = time.perf_counter()
        request = _Request(group.payload, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._drain_task is None or self._drain_task.done():
            self._drain_task = asyncio.create_task(self._drain())
        try:
            scored = await asyncio.wait_for(request.answer, self._timeout_s)
        except TimeoutError:
            raise ScoreFailed(
                f"{self.name} gave no score for prompt {group.info.prompt_id!r} within "
                f"{self._timeout_s} s (score.timeout_s)"
            ) from None
        info = ScoredInfo(
            group=group.info,
            rewards=tuple(score.value for score in scored.scores),
            seconds=time.perf_counter() - start,
            scorer=self.name,
            parts={
                part: tuple(score.parts[part] for score in scored.scores)
                for part in scored.scores[0].parts
            },
        )
        return Parcel(info=info, payload=scored)

    def score_rollouts(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """The same for whoever has no event loop (evaluation). Raises the first ScoreFailed."""
        out = []
        for scored in self._rewards.score(rollouts):
            if isinstance(scored, ScoreFailed):
                raise scored
            out.append(scored)
        return out

    async def restart(self) -> None:
        """Leave a thread that hangs to itself, and fail what waits. A thread cannot be killed:
        only a scorer in a process of its own is really replaced."""
        self._fail_all("was restarted")

    async def close(self) -> None:
        """Fail what still waits. May be called twice."""
        self._fail_all("was closed")

    async def _drain(self) -> None:
        while batch := [r for r in self._waiting if not r.answer.done()]:
            self._waiting, self._being_scored = [], batch
            try:
                scored = await asyncio.to_thread(self._rewards.score, [r.rollout for r in batch])
            except Exception as error:  # whoever waits must hear of it, whatever it is
                cause = f"{self.name}: {type(error).__name__}: {error}"
                scored = [ScoreFailed(cause) for _ in batch]
            for request, result in zip(batch, scored, strict=True):
                _answer(request, result)
        self._waiting = self._being_scored = []

    def _fail_all(self, what: str) -> None:
        if self._drain_task is not None:
            self._drain_task.cancel()
            self._drain_task = None
        for request in (*self._being_scored, *self._waiting):
            _answer(request, ScoreFailed(f"{self.name} {what}"))
        self._waiting = self._being_scored = []


def _answer(request: _Request, result: ScoredRollout | ScoreFailed) -> None:
    if request.answer.done():  # its deadline passed, or its caller has gone
        return
    if isinstance(result, ScoreFailed):
        request.answer.set_exception(result)
    else:
        request.answer.set_result(result)
