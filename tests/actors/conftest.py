"""One local Ray for the whole room, started as a run starts it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distrl.actors.cluster import connected
from distrl.config import Config


@pytest.fixture(scope="package")
def local_ray() -> Iterator[Config]:
    config = Config()
    with connected(config):
        yield config
