"""The fleet of generators: who holds which weights, and who may be given work.

Invariant: a generator is given work only while it holds, proved by its canary, weights at least
as new as the last ones that `load` finished with. `load` finishes when every generator that is up
holds the new weights; one that will not take them on is out of service before it finishes.
So once `load(v)` has returned, every token of newly dispatched work has version ≥ v.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from distrl.driver.fleet import Abandoned, Fleet, Note, Spawn, Worker
from distrl.records import Weights
from distrl.roles import Generator, RoleError, WorkerDied


class Generators(Fleet[Generator]):
    """Generators, and the weights that they hold."""

    def __init__(
        self,
        roles: Sequence[Generator],
        *,
        max_restarts: int,
        tries: int,
        spawn: Spawn,
        note: Note = lambda who, what, why: None,
    ) -> None:
        super().__init__(
            "generator", roles, max_restarts=max_restarts, tries=tries, spawn=spawn, note=note
        )
        self.reloads = 0
        self._weights: Weights | None = None
        self._required: int | None = None
        self._held: dict[Worker[Generator], int] = {}

    def held(self, worker: Worker[Generator]) -> int:
        """The version that a usable generator holds."""
        return self._held[worker]

    def is_usable(self, worker: Worker[Generator]) -> bool:
        held = self._held.get(worker)
        return (
            worker.state == "up"
            and held is not None
            and self._required is not None
            and held >= self._required
        )

    async def load(self, weights: Weights) -> None:
        """Bring every generator that is up to `weights`, all at once, work in flight or not.

        A failed load is tried once more; then the generator is restarted in the background, and
        this does not wait for it.
        """
        self._weights = weights
        up = [worker for worker in self.workers if worker.state == "up"]
        async with asyncio.TaskGroup() as loads:
            for worker in up:
                loads.create_task(self._update(worker))
        self._required = weights.version
        self._shortlist.renew(self.workers)
        self._changed.set()

    async def hold(self, worker: Worker[Generator], groups: int) -> None:
        """Tell `worker` to begin when `groups` wait. Where it fails, its work goes elsewhere."""
        try:
            await self.call(worker, worker.role.hold(groups))
        except (WorkerDied, Abandoned):
            return
        except RoleError as error:
            self.condemn(worker, error)

    async def prepare(self, worker: Worker[Generator]) -> None:
        """Load until the worker holds the newest weights, which may change meanwhile."""
        self._held.pop(worker, None)
        while self._weights is not None and self._held.get(worker) != self._weights.version:
            await self._take_on(worker)

    async def _update(self, worker: Worker[Generator]) -> None:
        try:
            await self._take_on(worker)
        except (WorkerDied, Abandoned):
            return  # condemned by whoever saw it die
        except RoleError as error:
            self.condemn(worker, error)

    async def _take_on(self, worker: Worker[Generator]) -> None:
        """Load the newest weights, twice at most.

        After a failed load nobody knows what the generator computes with: it gets no work, and
        what it has in flight is given up.
        """
        assert self._weights is not None
        weights = self._weights
        try:
            await self.call(worker, worker.role.load_weights(weights))
        except (WorkerDied, Abandoned):
            raise  # condemned, and its recovery is under way
        except RoleError as error:
            self._held.pop(worker, None)
            self.abandon(worker, error)
            self.reloads += 1
            weights = self._weights
            await self.call(worker, worker.role.load_weights(weights))
        self._held[worker] = weights.version
        self._note(worker.role.name, "loaded", str(weights.version))
