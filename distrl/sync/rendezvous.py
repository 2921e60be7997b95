"""Where the processes of a group meet: one listens, at no more addresses than it is told."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore


def wait_for_all(listener: socket.socket, world: int, timeout_s: float) -> TCPStore:
    """The store of a group whose rank 0 listens; it owns `listener` from now on.

    A bound socket, rather than a port, because torch would listen on all interfaces, and a free
    port may be somebody else's by the time it is used. Raises DistStoreError where not all of
    `world` come in time. (vLLM's `create_tcp_store` would then close the socket's descriptor a
    second time, whosever it may be by then.)
    """
    host, port = listener.getsockname()[:2]
    return TCPStore(
        host,
        port,
        world,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        use_libuv=False,  # as vLLM's workers have it
        master_listen_fd=listener.detach(),
    )


def go_to(host: str, port: int, world: int, timeout_s: float) -> TCPStore:
    """The same store, for who is not rank 0. Raises DistError where nobody listens in time."""
    wait = timedelta(seconds=timeout_s)
    return TCPStore(host, port, world, is_master=False, timeout=wait, use_libuv=False)
