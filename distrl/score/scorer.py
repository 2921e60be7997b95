"""The scorer role in one process: requests gather while a batch is being scored.

    score()    appends to the queue, waits for its own answer
    _drain()   one at a time: takes all that waits → the reward models on all of it → the rules on
               one group after the other, each answered as soon as it is scored
    _watched() runs either of these in a thread, under a deadline of its own
    _late()    that has passed: the groups are slow, or the thread hangs

So the event loop stays free, a lone request is scored at once, and under load requests
share forward passes without a timer. No group is charged for waiting behind others. A thread that
hangs keeps all the others out, and cannot be ended: then the group that it hangs at gets
NeverScored, and whoever else waits gets HeldUp, as the scorer serves nobody until it is restarted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from distrl.config import ScoreConfig
from distrl.models.crew import ALONE, Crew
from distrl.records import GroupInfo, Parcel, ScoredInfo, ScoredRollout
from distrl.roles import HeldUp, NeverScored, RoleError, ScoreFailed, WorkerDied
from distrl.score.batch import Batch
from distrl.score.compose import RewardSum

T = TypeVar("T")

NEARLY = 0.9
"""A thread that stood still for so much of a deadline that has passed is one that hangs. It stands
still a little shorter than it works, for it went through other groups before."""


@dataclass(frozen=True, eq=False)
class _Request:
    group: Parcel[GroupInfo]
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
        self._requests: list[_Request] = []
        self._dead: WorkerDied | None = None
        self._drain_task: asyncio.Task[None] | None = None

    async def score(self, group: Parcel[GroupInfo]) -> Parcel[ScoredInfo]:
        """Score one group; many calls may be in flight. The payload is a `Rollout`, and comes
        back as a `ScoredRollout`.

        Raises ScoreFailed: a part failed, or took longer than `score.timeout_s`; NeverScored or
        WorkerDied where the thread hangs, at this group or at another.
        """
        if self._dead is not None:
            raise _copy(self._dead)
        start = time.perf_counter()
        request = _Request(group, asyncio.get_running_loop().create_future())
        self._requests.append(request)
        if self._drain_task is None or self._drain_task.done():
            self._drain_task = asyncio.create_task(self._drain())
        scored = await request.answer
        info = ScoredInfo(
            group=group.info,
            rewards=tuple(score.value for score in scored.scores),
            seconds=time.perf_counter() - start,
            scorer=self.name,
            parts={
                part: tuple(score.parts[part] for score in scored.scores)
                for part in scored.scores[0].parts
            },
            merits=tuple(s.merit for s in scored.scores if s.merit is not None),
        )
        return Parcel(info=info, payload=scored)

    async def restart(self) -> None:
        """Leave a thread that hangs to itself, and fail what waits. A thread cannot be killed:
        only a scorer in a process of its own is really replaced."""
        self._fail_all(ScoreFailed(f"{self.name} was restarted"))
        self._dead = None

    async def close(self) -> None:
        """Fail what still waits. May be called twice."""
        self._fail_all(ScoreFailed(f"{self.name} was closed"))

    async def _drain(self) -> None:
        while batch := [r for r in self._requests if not r.answer.done()]:
            self._requests = list(batch)
            if not self._rewards.has_rules:  # nothing is left to be done for a group alone
                scored = await self._watched(batch, self._rewards.score)
                for request, result in zip(batch, scored, strict=True):
                    _answer(request, result)
                continue
            shared = await self._watched(batch, self._rewards.shared)
            for request, result in zip(batch, shared, strict=True):
                if request.answer.done():  # it was late, or its caller has gone
                    continue
                if not isinstance(result, ScoreFailed):
                    finished = partial(self._rewards.finished, [result])
                    (result,) = await self._watched([request], finished)
                _answer(request, result)
        self._requests = []

    async def _watched(
        self, requests: Sequence[_Request], work: Callable[[Batch], list[T]]
    ) -> list[T] | list[ScoreFailed]:
        """`work` on the groups of these requests, in a thread: a result for each."""
        batch = Batch([r.group.payload for r in requests])
        thread = asyncio.ensure_future(asyncio.to_thread(work, batch))
        try:
            while not (await asyncio.wait({thread}, timeout=self._timeout_s))[0]:
                self._late(requests, batch)  # again and again: it may be slow first, then hang
            return thread.result()
        except Exception as error:  # whoever waits must hear of it, whatever it is
            cause = f"{self.name}: {type(error).__name__}: {error}"
            return [ScoreFailed(cause) for _ in requests]
        finally:
            thread.cancel()

    def _late(self, requests: Sequence[_Request], batch: Batch) -> None:
        """A thread works on these longer than the deadline."""
        if batch.still_s() <= NEARLY * self._timeout_s:
            for request in requests:
                _answer(request, ScoreFailed(self._too_late(request.group.info)))
            return
        place = batch.present()
        if place is None:
            self._dead = WorkerDied(
                f"{self.name}: its reward models gave nothing within {self._timeout_s} s "
                "(score.timeout_s)"
            )
        else:
            culprit = requests[place].group.info
            self._dead = HeldUp(f"{self.name}: the reward of prompt {culprit.prompt_id!r} hangs")
            for one in self._requests:  # before the others end this scorer
                if one.group.info.index == culprit.index:
                    _answer(one, NeverScored(f"{self._too_late(culprit)}: its reward hangs"))
        self._fail_all(self._dead)

    def _too_late(self, group: GroupInfo) -> str:
        return (
            f"{self.name} gave no score for prompt {group.prompt_id!r} within "
            f"{self._timeout_s} s (score.timeout_s)"
        )

    def _fail_all(self, error: RoleError) -> None:
        if self._drain_task is not None:
            self._drain_task.cancel()
            self._drain_task = None
        for request in self._requests:
            _answer(request, _copy(error))
        self._requests = []


def _copy(error: RoleError) -> RoleError:
    """One for each who is told: whoever raises it leaves a traceback and notes on it."""
    return type(error)(*error.args)


def _answer(request: _Request, result: ScoredRollout | RoleError) -> None:
    if request.answer.done():  # it was late, or its caller has gone
        return
    if isinstance(result, RoleError):
        request.answer.set_exception(result)
    else:
        request.answer.set_result(result)
