"""A load under the driver's own deadline, and one that takes two at once: the learner sends, the
generator receives.

Either may fail, hang or die alone; then the other is freed, and the generator counts as dead,
because its engine may hold half of each version.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Protocol

from distrl.records import Offer, Receiver, Weights
from distrl.roles import CanaryMismatch, RoleError, WorkerDied

LAST_WORDS_S = 5
"""Where one side has failed, the other has so long to tell more. Twice that after the deadline of
the two sides, both are given up: whoever can still speak has said by then what went wrong."""


class Sender(Protocol):
    """The learner, as far as it matters here."""

    async def offer(self, weights: Weights, receiver: Receiver) -> Offer: ...

    async def send(self, name: str) -> None: ...

    def hang_up(self, name: str) -> None: ...


@asynccontextmanager
async def deadline(name: str, weights: Weights, timeout_s: float) -> AsyncIterator[None]:
    """For a load by generator `name`: a process that has been stopped keeps no deadline itself.

    Raises WorkerDied a little after `timeout_s` (`sync.timeout_s`).
    """
    limit = asyncio.timeout(timeout_s + 2 * LAST_WORDS_S)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise WorkerDied(
            f"{name}: version {weights.version} was neither loaded nor given up within "
            f"sync.timeout_s={timeout_s:g}; its process may have been stopped. If weights of this "
            "size take longer, raise sync.timeout_s"
        ) from None


async def send(
    weights: Weights,
    sender: Sender,
    receiver: Receiver,
    receive: Callable[[Offer], Coroutine[Any, Any, None]],
) -> None:
    """Have `sender` send `weights` while `receive` takes them.

    Raises what `receive` raises (CanaryMismatch: all arrived, the group stays), WorkerDied where
    it was not sent to the end or not in time, RoleError where nothing was begun: the version is
    not kept.
    """
    async with deadline(receiver.name, weights, receiver.timeout_s):
        offer = await sender.offer(weights, receiver)
        receiving = asyncio.ensure_future(receive(offer))
        sending = asyncio.ensure_future(sender.send(receiver.name))
        try:
            await _both(sending, receiving)
        except CanaryMismatch:
            raise
        except BaseException as error:
            for end in (sending, receiving):
                end.cancel()
            sender.hang_up(receiver.name)
            if isinstance(error, WorkerDied) or not isinstance(error, RoleError):
                raise
            raise WorkerDied(
                f"{receiver.name}: version {weights.version} was not sent: {error}"
            ) from error


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
