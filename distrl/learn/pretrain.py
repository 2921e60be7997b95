"""SFT examples for PPO-ptx: written once by whoever prepares a run, read by the learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from distrl.disk import writing
from distrl.models.folder import AGAIN


@dataclass(frozen=True)
class Examples:
    """Token ids of whole examples, each of at least two tokens, in a fixed order."""

    ids: tuple[Tensor, ...]

    @classmethod
    def load(cls, path: Path) -> Examples:
        """What `save_examples` wrote."""
        stored = load_file(path)
        ids = stored["ids"].long().split(stored["lengths"].tolist())
        return cls(tuple(ids))

    def turn(self, turn: int, count: int) -> list[Tensor]:
        """The `count` examples of a turn: one after another, and round."""
        first = turn * count
        return [self.ids[place % len(self.ids)] for place in range(first, first + count)]


def save_examples(examples: Sequence[Sequence[int]], path: Path) -> None:
    """Write examples of at least two tokens each; shorter ones have nothing to predict and are left
    out. Raises ValueError where none is left, and NotWritten where the disk is full or refuses."""
    kept = [np.asarray(ids, dtype=np.int32) for ids in examples if len(ids) > 1]
    if not kept:
        raise ValueError("there is no example of two tokens or more")
    lengths = np.array([len(ids) for ids in kept], dtype=np.int64)
    with writing("the text that learn.pretrain mixes in", path, AGAIN, 4 * int(lengths.sum())):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"ids": np.concatenate(kept), "lengths": lengths}, path)
