"""Sending weights: the learner's half of the transports `gloo` and `nccl`.

Every engine has a *line* of its own to the learner, a group of these two alone, so that one which
dies or does not come disturbs nobody else. A line lasts as long as all goes well on it. After any
failure it is dead: the next offer makes another, at another port, for the engine's successor.

What is sent is the published image, checked and kept by `SharedMemoryPublisher`: so the learner may
go on meanwhile, a generator may be a version behind, and the model is not twice on the device.

Who waits for whom: `offer` for nobody; `send` for the engine, and at most `timeout_s` for all of
it. Collectives have no deadline that can be relied on, so they run in a daemon thread; one that is
never freed ends with the process.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Protocol

from distrl.records import Offer, Receiver, Weights
from distrl.sync.gloo import GlooGroup
from distrl.sync.image import Image
from distrl.sync.nccl import NCCLGroup

LATER_S = 5
"""A group's own deadline comes so much after the line's, which can say who is missing."""


class TransferFailed(Exception):
    """Weights were not sent; the message says to whom, and what went wrong."""


class Communicator(Protocol):
    """A group with the learner as rank 0."""

    def send(self, image: Image) -> None: ...

    def destroy(self) -> None: ...


MEET: dict[str, Callable[[socket.socket, int, float], Communicator]] = {
    "gloo": GlooGroup.meet,
    "nccl": NCCLGroup.meet,
}
"""How a group is made, by transport: bound socket, processes in all, deadline in seconds."""


class Line:
    """The way from the learner to one engine."""

    def __init__(self, transport: str, receiver: Receiver, host: str) -> None:
        """host: the address that the learner listens on."""
        self.receiver = receiver
        self.dead = False
        self._meet = MEET[transport]
        self._listener = socket.create_server((host, 0))
        self._host, self._port = self._listener.getsockname()[:2]
        self._group: Communicator | None = None
        self._image: Image | None = None
        self._sending: Future[None] | None = None

    def offer(self, image: Image) -> Offer:
        """Have `image` ready to be sent."""
        self._image = image
        return Offer(
            host=self._host,
            port=self._port,
            world=1 + self.receiver.workers,
            tensors=image.infos,
        )

    def send(self) -> None:
        """Send what was offered, after meeting the engine if need be. Raises TransferFailed."""
        if self._image is None or self.dead:
            raise TransferFailed(f"nothing is offered to {self._name}")
        sending: Future[None] = Future()
        self._sending = sending
        threading.Thread(
            target=self._run, args=(sending,), name=f"to {self._name}", daemon=True
        ).start()
        try:
            sending.result(self.receiver.timeout_s)
        except TimeoutError:
            late = "did not come to" if self._group is None else "did not take the weights at"
            reason = f"{late} {self._host}:{self._port} within {self.receiver.timeout_s:g} s"
            self.hang_up(reason)
            raise TransferFailed(f"{self._name} {reason}") from None
        except TransferFailed as error:
            self.hang_up(str(error))
            raise

    def hang_up(self, why: str) -> None:
        """Give the line up, whoever is sending on it. May be called twice."""
        self.dead = True
        self._image = None  # what nobody fetches any more may be written over
        self._listener.close()
        if self._sending is not None:
            _settle(self._sending, TransferFailed(f"{self._name}: {why}"))
        if self._group is not None:
            self._group.destroy()

    def _run(self, sending: Future[None]) -> None:
        try:
            if self._group is None:
                workers = 1 + self.receiver.workers
                patience_s = self.receiver.timeout_s + LATER_S
                self._group = self._meet(self._listener, workers, patience_s)
                if self.dead:  # it was given up meanwhile
                    self._group.destroy()
            image, self._image = self._image, None
            if image is None:
                raise TransferFailed("its load was given up")
            self._group.send(image)
        except Exception as error:  # of whatever kind: `send` waits for it, in another thread
            _settle(sending, TransferFailed(f"{self._name}: {error}"))
        else:
            _settle(sending, None)

    @property
    def _name(self) -> str:
        return f"{self.receiver.name} (start {self.receiver.start})"


class Switchboard:
    """All lines of a learner, by the generator's name. Its calls may come from many threads."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}
        self._lock = threading.Lock()

    def offer(self, weights: Weights, receiver: Receiver, host: str) -> Offer:
        """Have a version ready for one engine. Raises TransferFailed where it is not kept."""
        try:
            image = Image(weights.locator, weights.version)
        except OSError as error:
            raise TransferFailed(
                f"the learner does not keep version {weights.version} any more: {error}"
            ) from error
        with self._lock:
            old = line = self._lines.get(receiver.name)
            if line is None or line.dead or line.receiver != receiver:
                line = self._lines[receiver.name] = Line(weights.transport, receiver, host)
        if old is not None and old is not line:
            old.hang_up("another line was opened")
        return line.offer(image)

    def send(self, name: str) -> None:
        """Send generator `name` what it was offered. Raises TransferFailed."""
        self._lines[name].send()

    def hang_up(self, name: str) -> None:
        """Its load has failed: nobody takes what is being sent."""
        if (line := self._lines.get(name)) is not None:
            line.hang_up("its load failed")

    def close(self) -> None:
        for name in list(self._lines):
            self.hang_up(name)


def _settle(future: Future[None], error: TransferFailed | None) -> None:
    """End a future, unless somebody else was first."""
    with suppress(InvalidStateError):
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
