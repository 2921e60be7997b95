"""What the object store lost with a machine: each role says so in its own words. No Ray runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ObjectLostError, ObjectReconstructionFailedError, RayTaskError

from distrl.actors.batching import Piece
from distrl.actors.handles import ActorHandle, LearnerHandle, ScorerHandle
from distrl.records import Parcel
from distrl.roles import LearnerFailed, PayloadLost

GONE = ObjectReconstructionFailedError("ab" * 28, None, "")
TASK = RayTaskError("take", "Traceback", ObjectLostError("ab" * 28, None, ""))


def raises(error: Exception) -> Callable[..., Any]:
    """A remote method whose answer is this error."""

    def remote(*arguments: Any) -> asyncio.Future[Any]:
        answer = asyncio.get_running_loop().create_future()
        answer.set_exception(error)
        return answer

    return remote


def never(*arguments: Any) -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


def handle(kind: type[ActorHandle], name: str, **methods: Callable[..., Any]) -> Any:
    made = kind(name, lambda: None, Path("no.log"), 1)
    made.actor = SimpleNamespace(**{k: SimpleNamespace(remote=v) for k, v in methods.items()})
    return made


@pytest.mark.parametrize("error", [GONE, TASK, TASK.as_instanceof_cause()])
async def test_a_scorer_that_finds_nothing_to_score_says_that_it_is_lost(error: Exception) -> None:
    """Whichever way Ray tells it, and to each who asked in that call."""
    scorer = handle(
        ScorerHandle, "scorer-0", take=raises(error), give=lambda: (never(), None), drop=never
    )
    info: Any = None
    groups = [Parcel(info=info, payload=Piece("batch", place)) for place in range(3)]
    for answer in await asyncio.gather(*map(scorer.score, groups), return_exceptions=True):
        assert isinstance(answer, PayloadLost)
        assert str(answer).startswith(
            "scorer-0: a payload is lost with the machine that held it: Failed to retrieve"
        )
    scorer.counter().close()


async def test_a_learner_that_finds_nothing_to_learn_from_ends_the_run_and_names_the_fix() -> None:
    learner = handle(LearnerHandle, "learner", learn=raises(GONE))
    with pytest.raises(LearnerFailed, match=r"is lost with the machine(.|\n)*go on with --resume"):
        await learner.learn([Piece("batch", 0)])


async def test_whoever_looks_at_a_lost_payload_is_told_likewise() -> None:
    with pytest.raises(PayloadLost, match="is lost with the machine"):
        await Piece(raises(GONE)(), 0)
