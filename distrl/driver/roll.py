"""FEED and ROLL: from prompts to scored groups in the buffer.

Invariant: every prompt taken from the source is in exactly one of four places: under way
(`tickets`), in the buffer, taken from it by the learn loop, or dropped with a reason.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from distrl.driver.admission import Admission
from distrl.driver.assembly import Assembly
from distrl.driver.buffer import Landed, OrderedBuffer
from distrl.driver.errors import DriverError, OutOfStep
from distrl.driver.fleet import Fleet, GroupLost, Spawn, Worker
from distrl.driver.generators import Generators
from distrl.driver.ledger import Ledger
from distrl.driver.ports import PromptSource
from distrl.driver.reason import kind_of, one_line
from distrl.driver.staleness import STALE, StalenessRule
from distrl.driver.state import Progress
from distrl.driver.ticket import Ticket, Waste
from distrl.records import GroupInfo, Parcel, Prompt, ScoredInfo
from distrl.roles import Generator, PayloadLost, RoleError, Scorer

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Generating:
    """Witness of a group being generated: each further try is another attempt."""

    ticket: Ticket
    roller: Roller

    def waits(self, why: str) -> None:
        self.ticket.holder, self.ticket.version = why, None

    def held_by(self, worker: Worker[Generator]) -> None:
        ticket, roller = self.ticket, self.roller
        ticket.holder, ticket.began_s = worker.role.name, roller.clock()
        ticket.version = roller.generators.held(worker)

    def failed(self, name: str, error: RoleError) -> None:
        ticket, roller = self.ticket, self.roller
        why = type(error).__name__
        roller.waste.add(f"failed: {why}", 0, roller.clock() - ticket.began_s)
        roller.ledger.failed(ticket.prompt.index, f"{name}: {why}: {error}")
        roller.tell_first("tried again", ticket.prompt, name, f"{why}: {error}")


@dataclass(slots=True)
class _Scoring:
    """Witness of a group being scored: what was generated stays, whoever scores it."""

    ticket: Ticket
    roller: Roller

    def waits(self, why: str) -> None:
        self.ticket.holder = why

    def held_by(self, worker: Worker[Scorer]) -> None:
        self.ticket.holder = worker.role.name

    def failed(self, name: str, error: RoleError) -> None:
        prompt = self.ticket.prompt
        self.roller.ledger.event(name, "gave no score", f"group {prompt.index}: {error}")
        self.roller.tell_first("tried again", prompt, name, f"{type(error).__name__}: {error}")


SILENT = "no signal"
"""Reason of a drop: all rewards of the group are equal."""

MAX_SILENT = 1000
"""So many groups without signal in a row are no accident."""

MIN_LOST, LOST_BATCHES = 100, 10
"""Nor are so many that were given up, or so many learner steps' worth of them."""


@dataclass(kw_only=True)
class Roller:
    """The feed loop, and one roll task for each group.

    Attributes:
        issued: index of the next prompt.
        landed_tokens: response tokens of all groups that landed; landed_samples: their samples.
        tickets: the groups under way, by index.
        settled: indices from `issued` on that were trained or dropped before a resume.
        waste: what was generated for nothing, or tried in vain.
    """

    source: PromptSource
    admission: Admission
    buffer: OrderedBuffer
    generators: Generators
    scorers: Fleet[Scorer]
    progress: Progress
    spawn: Spawn
    clock: Callable[[], float]
    ledger: Ledger
    rule: StalenessRule
    samples_per_prompt: int
    skip_without_signal: bool
    lockstep: bool
    issued: int
    settled: Collection[int] = ()

    def __post_init__(self) -> None:
        self.waste = Waste()
        self.silent_in_a_row = 0
        self.lost_in_a_row = 0
        self.landed_tokens = 0
        self.landed_samples = 0
        self.tickets: dict[int, Ticket] = {}
        self._told: set[tuple[str, str]] = set()
        self._assembly = Assembly(
            lambda: all(ticket.group is not None for ticket in self.tickets.values())
        )

    async def feed(self) -> None:
        """Admit prompts for ever, as slots and room allow."""
        while True:
            count = await self.admission.admit()
            prompts = [self._next_prompt() for _ in range(count)]
            firsts = await self._deal(count) if self.lockstep else [None] * count
            for prompt, first in zip(prompts, firsts, strict=True):
                ticket = Ticket(prompt, self.clock(), self.rule.bound)
                self.tickets[prompt.index] = ticket
                self.ledger.issued(prompt)
                ticket.task = self.spawn(self._roll(ticket, first))

    def version_changed(self) -> None:
        """Give up what no gradient can use any more: in the buffer, and in flight."""
        if self.rule.on_stale is None:
            return
        version = self.progress.version
        swept = self.buffer.sweep(
            lambda landed: self.rule.dooms_group(landed.parcel.info.group, version), STALE
        )
        for landed in swept:
            self._lose(landed.parcel.info.group, STALE)
            self.ledger.dropped(landed.index, f"{STALE}: in the buffer")
            self.admission.discarded()
        for ticket in self.tickets.values():
            if not ticket.doomed and self._is_doomed(ticket, version) and ticket.task is not None:
                ticket.doomed = True
                ticket.task.cancel()

    def _is_doomed(self, ticket: Ticket, version: int) -> bool:
        """Before it was generated, a group is reckoned as old as the weights when it was given
        to a generator; what is masked is not known before, so then it is waited for."""
        if ticket.group is not None:
            return self.rule.dooms_group(ticket.group, version)
        if self.rule.on_stale == "mask" or ticket.version is None:
            return False
        return self.rule.dooms(ticket.version, ticket.version, version)

    def _lose(self, group: GroupInfo, reason: str) -> None:
        self.waste.add(reason, sum(group.lengths), group.seconds)

    def tell_first(self, fate: str, prompt: Prompt, who: str, reason: str) -> None:
        """The first of each kind in a run goes to the screen; the ledger has them all."""
        kind = kind_of(reason)
        if (fate, kind) not in self._told:
            self._told.add((fate, kind))
            why = one_line(f"{who}: {reason}" if who else reason)
            logger.warning(
                "the group of prompt %r is %s (more of this kind are not told): %s",
                prompt.prompt_id,
                fate,
                why,
            )

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
        while prompt.index == self.issued and prompt.index in self.settled:
            self.issued += 1
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
        try:
            scored = await self._roll_out(ticket, first)
        except GroupLost as lost:
            self._drop(ticket, str(lost), "given up")
            self._check_lost(lost)
        except asyncio.CancelledError:
            if not ticket.doomed:
                raise
            self._drop(ticket, STALE, STALE)
        else:
            self.lost_in_a_row = 0
            if self.rule.dooms_group(scored.info.group, self.progress.version):
                self._drop(ticket, STALE, STALE)
            elif self.skip_without_signal and self._is_silent(scored.info):
                self._drop(ticket, SILENT, SILENT)
            else:
                self._land(ticket, scored)

    def _check_lost(self, lost: GroupLost) -> None:
        """Raise DriverError where group after group is given up and none comes through."""
        self.lost_in_a_row += 1
        if self.lost_in_a_row >= max(MIN_LOST, LOST_BATCHES * self.buffer.batch):
            raise DriverError(
                f"{self.lost_in_a_row} groups in a row were given up, each after driver.attempts "
                f"tries, and none came through; the last: {lost}. Mend it, and go on with --resume"
            )

    def _is_silent(self, scored: ScoredInfo) -> bool:
        """Whether a group says nothing of what is better. Raises DriverError where none does."""
        silent = scored.silent
        self.silent_in_a_row = self.silent_in_a_row + 1 if silent else 0
        if self.silent_in_a_row >= MAX_SILENT:
            raise DriverError(
                f"{MAX_SILENT} groups in a row had equal rewards ({scored.rewards[0]:g} the last),"
                " and driver.skip_without_signal drops such groups; look at the reward, or at "
                "prompts that are too easy or too hard"
            )
        return silent

    def _drop(self, ticket: Ticket, reason: str, account: str) -> None:
        index = ticket.prompt.index
        del self.tickets[index]
        if ticket.group is not None:
            self._lose(ticket.group, account)
        elif ticket.version is not None:
            self.waste.add(account, 0, self.clock() - ticket.began_s)
        self.ledger.dropped(index, reason)
        self.tell_first("dropped", ticket.prompt, "", reason)
        self.buffer.drop(index, reason)
        self.admission.dropped()
        self._assembly.look()

    async def _roll_out(
        self, ticket: Ticket, first: Worker[Generator] | None
    ) -> Parcel[ScoredInfo]:
        """Generate and score; anew where what was generated is lost, `driver.attempts` times."""
        for left in reversed(range(self.generators.tries)):
            try:
                return await self._score(ticket, await self._generate(ticket, first))
            except PayloadLost as lost:
                if not left:
                    raise GroupLost(f"{type(lost).__name__}: {lost}") from lost
                self._begin_anew(ticket, lost)
            first = None
        raise AssertionError("tries is at least 1")

    def _begin_anew(self, ticket: Ticket, lost: PayloadLost) -> None:
        why = type(lost).__name__
        if ticket.group is not None:
            self._lose(ticket.group, f"failed: {why}")
            ticket.group = None
        self.generators.retries += 1
        self.ledger.failed(ticket.prompt.index, f"{ticket.holder}: {why}: {lost}")
        self.tell_first("generated again", ticket.prompt, ticket.holder, f"{why}: {lost}")

    async def _generate(self, ticket: Ticket, first: Worker[Generator] | None) -> Parcel[GroupInfo]:
        generated = await self.generators.do(
            lambda role: role.generate(ticket.prompt),
            witness=_Generating(ticket, self),
            load=self._expected_tokens(ticket.prompt),
            first=first,
        )
        self._check_group(ticket.prompt, generated.info)
        ticket.group = generated.info
        self.ledger.generated(generated.info)
        return generated

    async def _score(self, ticket: Ticket, generated: Parcel[GroupInfo]) -> Parcel[ScoredInfo]:
        scorer = None
        if self.lockstep:
            place = await self._assembly.join(ticket.prompt.index)
            if ready := self.scorers.usable():
                scorer = ready[place % len(ready)]
        scored = await self.scorers.do(
            lambda role: role.score(generated),
            witness=_Scoring(ticket, self),
            load=sum(generated.info.lengths),
            first=scorer,
        )
        self.ledger.scored(scored.info)
        return scored

    def _expected_tokens(self, prompt: Prompt) -> int:
        """Tokens that a generator will have to compute, if the group is as long as most."""
        mean = self.landed_tokens // self.landed_samples if self.landed_samples else 1
        return self.samples_per_prompt * (len(prompt.token_ids) + mean)

    def _check_group(self, prompt: Prompt, info: GroupInfo) -> None:
        if info.index != prompt.index or len(info.lengths) != self.samples_per_prompt:
            raise DriverError(
                f"{info.generator} answered prompt {prompt.index} with group {info.index} of "
                f"{len(info.lengths)} samples; {self.samples_per_prompt} samples were due"
            )

    def _land(self, ticket: Ticket, scored: Parcel[ScoredInfo]) -> None:
        now = self.clock()
        del self.tickets[ticket.prompt.index]
        self.progress.moved_s = now
        self.landed_tokens += sum(scored.info.group.lengths)
        self.landed_samples += len(scored.info.group.lengths)
        self.buffer.put(
            Landed(
                parcel=scored,
                bound=ticket.bound,
                admitted_s=ticket.admitted_s,
                landed_s=now,
                landed_version=self.progress.version,
            )
        )
        self.ledger.admitted(scored.info.group.index)
        self.admission.landed()
