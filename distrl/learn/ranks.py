"""The processes that share a learner's work.

Each rank is given the whole batch, for tokens are small beside weights, reads a part of it, and
adds up with the others what was found. So what the ranks know after every sum is the same, and
they decide alike: no rank waits for a collective call that another leaves out.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distrl.data.batching import balanced, micro_batches
from distrl.learn.spec import Place
from distrl.models.crew import ALONE as ONE_THREAD
from distrl.models.crew import Crew
from distrl.sync.rendezvous import go_to, wait_for_all

Load = list[tuple[Tensor, bool]]
"""One thread's microbatches, and whether they count."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the learner; alone by default, when nothing is communicated.
    Its `crew` shares the passes of one that is alone."""

    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None
    crew: Crew = ONE_THREAD

    @classmethod
    def join(cls, place: Place, device: torch.device) -> Ranks:
        """Meet the others at `place.address`. Raises DistError where they do not come in time."""
        if place.address.startswith("127."):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=_met(place),
            rank=place.rank,
            world_size=place.world,
            timeout=timedelta(seconds=place.timeout_s),
        )
        mesh = init_device_mesh(device.type, (place.world,))
        return cls(rank=place.rank, world=place.world, mesh=mesh)

    def leave(self) -> None:
        """Break the connections. May be called twice."""
        if self.mesh is not None and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the one that writes what is written once."""
        return self.rank == 0

    def add(self, *tensors: Tensor) -> None:
        """Each becomes the sum over ranks, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def loads(
        self, lengths_B: Tensor, index: Tensor, budget: int, *, padded: bool = True
    ) -> list[Load]:
        """What each of this rank's threads reads of the sequences at `index`: microbatches of
        `budget` tokens (`micro_batches`) that the crew's threads have in hand together.

        Every pass over a sharded model is a meeting, so all ranks get as many: one that has fewer
        reads a sequence again, and is told with False that it does not count.
        """
        lengths, budget = lengths_B[index].tolist(), budget // self.crew.size
        cuts = []
        for share in balanced(lengths, self.world * self.crew.size):
            parts = micro_batches([lengths[i] for i in share], budget, padded=padded)
            cuts.append([index[share][part] for part in parts])
        if self.world == 1:
            return [[(part, True) for part in cut] for cut in cuts if cut]
        turns, mine = max(map(len, cuts)), cuts[self.rank]
        idle = [(index[:1], False)] * (turns - len(mine))
        return [[(part, True) for part in mine] + idle]


def _met(place: Place) -> TCPStore:
    host, _, port = place.address.rpartition(":")
    if place.rank > 0:
        return go_to(host, int(port), place.world, place.timeout_s)
    return wait_for_all(socket.create_server((host, int(port))), place.world, place.timeout_s)


ALONE = Ranks()
