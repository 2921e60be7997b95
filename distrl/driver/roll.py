"""FEED and ROLL: from prompts to scored groups in the buffer.

Invariant: every prompt taken from the source is in exactly one of four places: under way
(`tickets`), in the buffer, taken from it by the learn loop, or dropped with a reason.
"""

from __future__ import annotations

from asyncio import Lock
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distrl.driver.admission import Admission
from distrl.driver.buffer import Landed, OrderedBuffer
from distrl.driver.errors import DriverError, OutOfStep
from distrl.driver.fleet import Fleet, GroupLost, Spawn, Worker
from distrl.driver.generators import Generators
from distrl.driver.ports import PromptSource
from distrl.driver.state import Progress
from distrl.records import GroupInfo, Parcel, Prompt, ScoredInfo
from distrl.roles import Generator, Scorer


@dataclass(slots=True)
class Ticket:
    """A group under way: since when, and who has it."""

    prompt: Prompt
    admitted_s: float
    holder: str = "the driver"

    def held_by(self, name: str) -> None:
        self.holder = name


@dataclass(kw_only=True)
class Roller:
    """The feed loop, and one roll task for each group.

    Attributes:
        issued: index of the next prompt.
        landed_tokens: response tokens of all groups that landed.
        tickets: the groups under way, by index.
    """

    source: PromptSource
    admission: Admission
    buffer: OrderedBuffer
    generators: Generators
    scorers: Fleet[Scorer]
    progress: Progress
    spawn: Spawn
    clock: Callable[[], float]
    samples_per_prompt: int
    lockstep: bool
    issued: int

    def __post_init__(self) -> None:
        self.landed_tokens = 0
        self.tickets: dict[int, Ticket] = {}
        # In lockstep a scorer sees one group at a time: what shares a forward pass with it
        # would otherwise depend on who finished first, and with it the last bits of the reward.
        self._turns = {id(worker.role): Lock() for worker in self.scorers.workers}

    async def feed(self) -> None:
        """Admit prompts for ever, as slots and room allow."""
        while True:
            count = await self.admission.admit()
            prompts = [self._next_prompt() for _ in range(count)]
            firsts = await self._deal(count) if self.lockstep else [None] * count
            for prompt, first in zip(prompts, firsts, strict=True):
                ticket = Ticket(prompt, self.clock())
                self.tickets[prompt.index] = ticket
                self.spawn(self._roll(ticket, first))

    def pending(self) -> str:
        """One line for each group under way: its prompt, who has it, since when."""
        now = self.clock()
        lines = [
            f"  {index} ({ticket.prompt.prompt_id}): with {ticket.holder}, "
            f"admitted {now - ticket.admitted_s:.0f} s ago"
            for index, ticket in sorted(self.tickets.items())
        ]
        return "\n".join(lines) or "  none"

    def _next_prompt(self) -> Prompt:
        prompt = self.source.next()
        if prompt.index != self.issued:
            raise OutOfStep(
                f"the prompt source gave index {prompt.index} where {self.issued} was due; "
                "after seek(n), next() must count on from n"
            )
        self.issued += 1
        return prompt

    async def _deal(self, count: int) -> Sequence[Worker[Generator] | None]:
        """Lockstep: deal `count` prompts round, and tell each generator how many to wait for."""
        workers = self.generators.usable()[:count]
        if not workers:
            return [None] * count
        shares = Counter(place % len(workers) for place in range(count))
        for place, worker in enumerate(workers):
            await self.generators.hold(worker, shares[place])
        return [workers[place % len(workers)] for place in range(count)]

    async def _roll(self, ticket: Ticket, first: Worker[Generator] | None) -> None:
        """One group from prompt to buffer, or dropped: exactly one of the two."""
        index = ticket.prompt.index
        try:
            scored = await self._roll_out(ticket, first)
        except GroupLost as lost:
            del self.tickets[index]
            self.buffer.drop(index, str(lost))
            self.admission.dropped()
        else:
            del self.tickets[index]
            self._land(ticket, scored)

    async def _roll_out(
        self, ticket: Ticket, first: Worker[Generator] | None
    ) -> Parcel[ScoredInfo]:
        generated = await self.generators.do(
            lambda role: role.generate(ticket.prompt), holder=ticket.held_by, first=first
        )
        self._check_group(ticket.prompt, generated.info)
        return await self.scorers.do(
            lambda role: self._score(role, generated), holder=ticket.held_by
        )

    async def _score(self, role: Scorer, group: Parcel[GroupInfo]) -> Parcel[ScoredInfo]:
        if not self.lockstep:
            return await role.score(group)
        async with self._turns[id(role)]:
            return await role.score(group)

    def _check_group(self, prompt: Prompt, info: GroupInfo) -> None:
        if info.index != prompt.index or len(info.lengths) != self.samples_per_prompt:
            raise DriverError(
                f"{info.generator} answered prompt {prompt.index} with group {info.index} of "
                f"{len(info.lengths)} samples; {self.samples_per_prompt} samples were due"
            )

    def _land(self, ticket: Ticket, scored: Parcel[ScoredInfo]) -> None:
        now = self.clock()
        self.progress.moved_s = now
        self.landed_tokens += sum(scored.info.group.lengths)
        self.buffer.put(
            Landed(
                parcel=scored,
                admitted_s=ticket.admitted_s,
                landed_s=now,
                landed_version=self.progress.version,
            )
        )
        self.admission.landed()
