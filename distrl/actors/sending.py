"""A load that takes two at once: the learner sends, the generator receives.

Either may fail, hang or die alone; then the other is freed, and the generator counts as dead,
because its engine may hold half of each version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from distrl.records import Offer, Receiver, Weights
from distrl.roles import CanaryMismatch, RoleError, WorkerDied

LAST_WORDS_S = 5
"""Where one side has failed, the other has so long to tell more. Twice that after the deadline of
the two sides, both are given up."""


class Sender(Protocol):
    """The learner, as far as it matters here."""

    async def offer(self, weights: Weights, receiver: Receiver) -> Offer: ...

    async def send(self, name: str) -> None: ...

    def hang_up(self, name: str) -> None: ...


async def send(
    weights: Weights,
    sender: Sender,
    receiver: Receiver,
    receive: Callable[[Offer], Coroutine[Any, Any, None]],
) -> None:
    """Have `sender` send `weights` while `receive` takes them.

    Raises what `receive` raises (CanaryMismatch: all arrived, the group stays), WorkerDied where
    it was not sent to the end, RoleError where nothing was begun: the version is not kept.
    """
    offer = await sender.offer(weights, receiver)
    receiving = asyncio.ensure_future(receive(offer))
    sending = asyncio.ensure_future(sender.send(receiver.name))
    try:
        async with asyncio.timeout(receiver.timeout_s + 2 * LAST_WORDS_S):
            await _both(sending, receiving)
    except CanaryMismatch:
        raise
    except BaseException as error:
        for end in (sending, receiving):
            end.cancel()
        sender.hang_up(receiver.name)
        if isinstance(error, WorkerDied) or not isinstance(error, RoleError | TimeoutError):
            raise
        raise WorkerDied(_what_happened(weights, receiver, error)) from error


async def _both(sending: asyncio.Future[None], receiving: asyncio.Future[None]) -> None:
    """Until both are done, or one has failed: the receiver's own words come first."""
    ends = {sending, receiving}
    ended, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_EXCEPTION)
    if receiving not in ended:
        await asyncio.wait({receiving}, timeout=LAST_WORDS_S)
    ended = [end for end in (receiving, sending) if end.done()]
    failures = [failure for end in ended if (failure := end.exception()) is not None]
    if len(failures) == 2 and all(isinstance(failure, RoleError) for failure in failures):
        raise WorkerDied("; ".join(map(str, failures))) from failures[0]
    if failures:
        raise failures[0]


def _what_happened(weights: Weights, receiver: Receiver, error: RoleError | TimeoutError) -> str:
    if isinstance(error, TimeoutError):
        return (
            f"{receiver.name}: version {weights.version} was neither loaded nor given up within "
            f"sync.timeout_s={receiver.timeout_s:g}; its process may have been stopped"
        )
    return f"{receiver.name}: version {weights.version} was not sent: {error}"
