"""Threads that share the passes of one process.

Each takes sequences of its own and computes with one core, as if it were a rank of a learner. The
usual way, one pass with the threads inside every operation, has them wait for each other thousands
of times a step: on two cores 1.77 times as fast as one against 1.90 here (4 M parameters), and
eight times slower than one, instead of no faster, as soon as something else wants a core.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

LARGEST = 4
"""Threads at most; with more cores each has several. What Python does in a pass is done by one
thread at a time, about a tenth of it."""

T = TypeVar("T")
R = TypeVar("R")


class Crew:
    """`size` threads with `inner` cores each; a crew of one is the thread that asks."""

    def __init__(self, size: int = 1, inner: int = 1) -> None:
        self.size = size
        self._pool = None
        if size > 1:  # how many cores torch uses is a thread's own affair
            self._pool = ThreadPoolExecutor(size, "crew", torch.set_num_threads, (inner,))

    @classmethod
    def of_cores(cls, cores: int) -> Crew:
        """A crew that keeps `cores` busy; sets torch's own threads in this process."""
        size = next(size for size in range(min(cores, LARGEST), 0, -1) if cores % size == 0)
        torch.set_num_threads(cores // size)
        return cls(size, cores // size)

    def run(self, work: Callable[[T], R], loads: Sequence[T]) -> list[R]:
        """`work` of each load, in their order, with gradients or without as the caller has it.

        An error is raised once nobody works any more: the first load's that has one.
        """
        if self._pool is None or len(loads) < 2:
            return [work(load) for load in loads]
        with_gradients = torch.is_grad_enabled()  # this is a thread's own as well

        def member(load: T) -> R:
            with torch.set_grad_enabled(with_gradients):
                return work(load)

        futures = [self._pool.submit(member, load) for load in loads]
        failures = [error for future in futures if (error := future.exception()) is not None]
        if failures:
            raise failures[0]
        return [future.result() for future in futures]

    def together(self, work: Sequence[Callable[[], R]]) -> list[R]:
        """`run` of calls that may be of different kinds."""
        return self.run(lambda call: call(), work)

    def close(self) -> None:
        """End the threads. May be called twice."""
        if self._pool is not None:
            self._pool.shutdown()


ALONE = Crew()


@contextmanager
def crew_for(device: torch.device) -> Iterator[Crew]:
    """A crew of the cores that torch has in this process, and gets back; alone on a GPU."""
    if device.type != "cpu":
        yield ALONE
        return
    cores = torch.get_num_threads()
    crew = Crew.of_cores(cores)
    try:
        yield crew
    finally:
        crew.close()
        torch.set_num_threads(cores)


class Gradients:
    """Where one load's ways back leave what they find.

    A crew's gradients are kept apart and added in the order of loads: whoever is done first, the
    sum is the same to the bit.
    """

    def __init__(self, weights: Sequence[Tensor] | None = None) -> None:
        """weights: whose gradients; None: they go straight where autograd puts them."""
        self._weights = weights or ()
        self._apart = weights is not None
        self._found: list[Tensor | None] = [None] * len(self._weights)

    def backward(self, loss: Tensor) -> None:
        """Take the way back from `loss`."""
        if not self._apart:
            return loss.backward()
        new = torch.autograd.grad(loss, self._weights, allow_unused=True)
        # Autograd may give one tensor to two weights.
        owners = Counter(g.untyped_storage().data_ptr() for g in new if g is not None)
        for place, gradient in enumerate(new):
            if gradient is None:
                continue
            before, memory = self._found[place], gradient.untyped_storage()
            if before is not None:
                before.add_(gradient)
            elif owners[memory.data_ptr()] == 1 and _fills(memory, gradient):
                self._found[place] = gradient
            else:
                self._found[place] = gradient.clone(memory_format=torch.contiguous_format)

    def _hand_over(self, places: range) -> None:
        for place in places:
            weight, gradient = self._weights[place], self._found[place]
            self._found[place] = None
            if weight.grad is None:
                weight.grad = gradient
            elif gradient is not None:
                weight.grad.add_(gradient)


def _fills(memory: torch.UntypedStorage, gradient: Tensor) -> bool:
    """Whether `memory` holds the numbers of `gradient`, in their order, and nothing else.

    Autograd may give a number spread out, or a part of something larger; or numbers in another
    order than the weight's, which fused optimizers read wrongly without a word.
    """
    return gradient.is_contiguous() and memory.nbytes() == gradient.nbytes


def hand_over(found: Sequence[Gradients], crew: Crew) -> None:
    """Add all loads' gradients, of the same weights, to the weights' own; each thread does so for
    some of the weights."""

    def add(places: range) -> None:
        for gradients in found:
            gradients._hand_over(places)

    weights = found[0]._weights if found else ()
    starts = range(min(crew.size, len(weights)))
    crew.run(add, [range(start, len(weights), crew.size) for start in starts])
