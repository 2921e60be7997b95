"""A learner on other machines: what it saves has to be where the driver looks. No Ray runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distrl.actors.handles import ActorHandle, LearnerHandle
from distrl.checkpoint import CheckpointError


def rank(number: int, disk: Path | None) -> Callable[..., Any]:
    """An actor's `save`, to a disk of its own or to the driver's."""

    async def save(folder: Path) -> list[Path]:
        names = [f"policy.{number:05d}-of-00002.safetensors"]
        if number == 0:
            names.append("learner.json")
        own = folder if disk is None else disk / folder.relative_to("/")
        own.mkdir(parents=True, exist_ok=True)
        for name in names:
            (own / name).touch()
        return [folder / name for name in names]

    return save


def learner_of(*saves: Callable[..., Any]) -> LearnerHandle:
    def made(kind: type[ActorHandle], save: Callable[..., Any], *more: Any) -> Any:
        handle = kind("learner", lambda: None, Path("no.log"), 1, *more)
        handle.actor = SimpleNamespace(save=SimpleNamespace(remote=save))
        return handle

    first, *others = saves
    return made(LearnerHandle, first, [made(ActorHandle, save) for save in others])


async def test_ranks_that_share_the_drivers_storage_save(tmp_path: Path) -> None:
    await learner_of(rank(0, None), rank(1, None)).save(tmp_path / "learner")
    assert len(list((tmp_path / "learner").iterdir())) == 3


@pytest.mark.parametrize("away", [{0}, {1}, {0, 1}])
async def test_the_first_save_tells_of_storage_that_is_not_shared(
    tmp_path: Path, away: set[int]
) -> None:
    """Else a checkpoint without the learner would push out those before it."""
    disks = [tmp_path / "elsewhere" if number in away else None for number in range(2)]
    learner = learner_of(*(rank(number, disk) for number, disk in enumerate(disks)))
    with pytest.raises(CheckpointError) as error:
        await learner.save(tmp_path / "learner")
    said = str(error.value)
    for number in range(2):
        assert (f"policy.{number:05d}-of-00002.safetensors" in said) == (number in away)
    assert ("learner.json" in said) == (0 in away)
    assert f"not in {tmp_path / 'learner'} here: run.root has to lie on storage" in said
