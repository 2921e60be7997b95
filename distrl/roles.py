"""Who acts: what the driver may ask of a generator, a scorer and a learner.

A role is met by a handle on a Ray actor and by a fake on a virtual clock, a generator and a scorer
also by a plain class in one process; the driver cannot tell them apart. Everything is async.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from distrl.errors import UserError
from distrl.records import GroupInfo, Parcel, Prompt, ScoredInfo, StepReport, Weights


class RoleError(UserError):
    """A role failed at one piece of work; the work may be tried again elsewhere."""


class WorkerDied(RoleError):
    """The process behind a role is gone. `restart()` brings up another."""


class HeldUp(WorkerDied):
    """The process serves nobody, as one piece of work never ends there. That is the work's fault,
    so the restart is not one of the worker's `driver.max_restarts`."""


class PayloadLost(RoleError):
    """What a role was given, or gave, is gone with the machine that held it. Whoever noticed is not
    to blame, and nobody else can do it either: the group has to be generated anew."""


class EngineFailed(WorkerDied):
    """A generator's engine did not come up; the log of whoever started it says why."""


class CanaryMismatch(RoleError):
    """A generator's log-probabilities differ from the learner's after a sync."""


class ScoreFailed(RoleError):
    """No score could be computed for a group. It is a failure, never a number."""


class NeverScored(ScoreFailed):
    """A group's score never comes. Another try would hold up another scorer: it is given up."""


class LearnerFailed(UserError):
    """The learner cannot go on (three non-finite steps in a row, say): the run stops."""


class Generator(Protocol):
    """Prompts in, groups of stamped samples out."""

    name: str

    async def generate(self, prompt: Prompt) -> Parcel[GroupInfo]:
        """Roll out one group. Many calls may be in flight.

        Raises RoleError: the group was lost and may be asked for again.
        """
        ...

    async def hold(self, groups: int) -> None:
        """Keep new groups back until `groups` of them wait, then start all at once.

        Lockstep mode: the engine sees the same batch whatever the order of arrival.
        """
        ...

    async def load_weights(self, weights: Weights) -> None:
        """Take on `weights` with requests in flight, and prove it by the canary.

        Raises CanaryMismatch: what it computes is not what the learner published.
        """
        ...

    async def restart(self) -> None:
        """Replace the process behind this role. It holds no weights of the run until
        `load_weights` is called."""
        ...

    async def close(self) -> None:
        """Free everything that the role holds. May be called twice."""
        ...


class Scorer(Protocol):
    """Groups in, groups with rewards out."""

    name: str

    async def score(self, group: Parcel[GroupInfo]) -> Parcel[ScoredInfo]:
        """Score one group. Raises ScoreFailed; HeldUp where another group never ends; PayloadLost
        where there is nothing to be scored any more."""
        ...

    async def restart(self) -> None:
        """Replace the process behind this role."""
        ...

    async def close(self) -> None: ...


class Learner(Protocol):
    """Batches in, better weights out."""

    async def learn(self, payloads: Sequence[Any], *, oldest: int = 0) -> StepReport:
        """One learner step on the groups behind `payloads`; tokens of versions before `oldest`
        are left out of the gradient. Raises LearnerFailed."""
        ...

    async def publish(self) -> Weights:
        """Make the present weights available to generators. Raises where they hold a
        NaN or Inf: such weights are never published."""
        ...

    async def save(self, folder: Path) -> None:
        """Write all of the learner's state below `folder`, where the caller finds it: raises
        where it is written to a disk that the caller does not see."""
        ...

    async def load(self, folder: Path) -> None:
        """Take up the state that `save` wrote below `folder`."""
        ...

    async def export(self, folder: Path) -> None:
        """Write the policy and its tokenizer in Hugging Face format (safetensors)."""
        ...

    async def close(self) -> None: ...
