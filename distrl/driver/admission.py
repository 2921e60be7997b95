"""Admission: how many groups may be under way, from which the staleness bound follows.

Let B be the groups of a learner step, l the lead (`driver.lead`, or else the staleness bound
`driver.max_staleness` itself) and W the look-ahead window (`driver.window`). There are

    S = (l + 1) · B − W    slots.

A slot is taken when a prompt is admitted. It is freed when its group was consumed *and* every
generator that may be given work holds the weights that came of it, or when it was dropped.

**Claim.** Every token of every group is at most l versions older than the learner when the
learner takes its gradient. So with l = max_staleness nothing can become too old; with more, what
did is dropped or masked before the gradient (`staleness.py`).

Notation. Steps count from 0; u_k is the learner's version when step k begins. A step adds 1 to the
version, or 0 where it was skipped for a non-finite gradient: 0 ≤ u_{j+1} − u_j ≤ 1. The place p(g)
of a group counts the groups consumed before it; step k consumes the places kB … (k+1)B − 1.

What is given:

1. A group is consumed before an earlier one only where the two are at most W prompts apart and
   the earlier one is still under way; dropped ones are passed over (`buffer.py`). So at most W
   groups that were issued after g are consumed before g.
2. The slots of step j are freed after those of every earlier step, and only once every generator
   that may be given work holds u_{j+1} or newer (`learn.py`, `generators.py`). A skipped step has
   u_{j+1} = u_j, which they hold already: its slots are freed at once.
3. Work goes only to generators that hold the weights of which 2 speaks, and what a generator
   holds only becomes newer; a retried group is sampled anew, hence later (`generators.py`).

Proof. Let g be consumed in step k, and let m steps have freed their slots when g was admitted.
By 2 and 3 every token of g was sampled by a version ≥ u_m. If k < m, g would have been consumed
before it was admitted; so k ≥ m. Of the groups at the places mB … p(g) − 1 at most W were issued
after g, by 1. The others were issued before g; at its admission they hold slots, for they are
never dropped and their steps (≥ m) have not freed theirs. With g itself that makes at least
p(g) − mB − W + 1 slots, so

    p(g) − mB − W + 1 ≤ S = (l + 1)B − W    hence    p(g) < (m + l + 1)B    hence    k ≤ m + l.

At the gradient the learner's version is u_k, so a token's age is at most

    u_k − u_m ≤ k − m ≤ l.                                                                     ∎

A drop hurts nowhere: a dropped group has no place, and its slot may go to a later prompt.
With l = 0 it says that B prompts are sampled, learned from, and only then the next B: lockstep.

**No deadlock.** The learner waits for groups and for loads, never for slots, and a load waits for
no group. So while the learner waits for groups, the last load ends, and then no consumed group
holds a slot. As W ≤ lB, S ≥ B: if fewer than B groups are in flight or buffered, a slot is free and
the byte bound does not apply (`OrderedBuffer.room`), so more are admitted. If B or more are, each
of them lands or is dropped, and then B of them can be taken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from distrl.driver.errors import DriverError


class Admission:
    """Counts slots, and lets the feed loop wait for one.

    Attributes:
        capacity: S, the number of slots.
        taken: slots of groups in flight, in the buffer, or consumed by an unfinished step.
        in_flight: groups admitted that neither landed nor were dropped.
        wanted: groups that the run still has to admit; a drop adds one.
    """

    def __init__(self, *, slots: int, wanted: int, room: Callable[[int], bool]) -> None:
        """`room(in_flight)` says whether the buffer has room for one more group."""
        self.capacity = slots
        self.taken = 0
        self.in_flight = 0
        self.wanted = wanted
        self._room = room
        self._closed = False
        self._changed = asyncio.Event()

    async def admit(self) -> int:
        """Wait until at least one prompt may be admitted; take the slots of all that may."""
        while not self._may_admit():
            self._changed.clear()
            await self._changed.wait()
        count = 0
        while self._may_admit():
            self.taken += 1
            self.in_flight += 1
            self.wanted -= 1
            count += 1
        return count

    def resize(self, slots: int) -> None:
        """From now on there are so many slots. What was admitted keeps its slot; until enough are
        free, nothing is admitted. The proof counts slots at a group's admission only, so a group
        is held to the lead that it was admitted under."""
        self.capacity = slots
        self.recheck()

    def landed(self) -> None:
        """A group reached the buffer. It keeps its slot."""
        self.in_flight -= 1
        self.recheck()

    def dropped(self) -> None:
        """A group in flight was given up: its slot is free, and one more prompt is wanted."""
        self.in_flight -= 1
        self.discarded()

    def discarded(self) -> None:
        """A group that had landed was given up: likewise."""
        self.wanted += 1
        self._free(1)

    def released(self, groups: int) -> None:
        """Consumed groups, and the generators hold what came of them."""
        self._free(groups)

    def recheck(self) -> None:
        """The buffer's room may have changed."""
        if self._may_admit():
            self._changed.set()

    def close(self) -> None:
        """Admit nothing more."""
        self._closed = True

    def _may_admit(self) -> bool:
        return (
            not self._closed
            and self.wanted > 0
            and self.taken < self.capacity
            and self._room(self.in_flight)
        )

    def _free(self, slots: int) -> None:
        self.taken -= slots
        if self.taken < self.in_flight:
            raise DriverError(f"{slots} slots freed that nobody held: a group was counted twice")
        self.recheck()
