"""Tiny runs to start from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from tests.end_to_end.process import RECIPE, Run


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe, and its SFT and reward-model stages done: by the first of pytest's
    workers that asks."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "stages"
    with FileLock(shared / "stages.lock"):
        if not folder.exists():
            building = shared / "stages-building"
            building.mkdir()
            make_stages(building)
            building.rename(folder)
    return folder


def make_stages(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    run = Run(folder, "reward-model")
    try:
        assert run.end() == 0, run.output
    finally:
        run.kill_all()
    assert "SFT: 0.1 M parameters" in run.output
    assert "Reward model: " in run.output


@pytest.fixture(scope="module")
def begin(stages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """`begin("train", ...)` starts a command on a copy of the stages, or in `folder`."""
    runs: list[Run] = []

    def start(*words: str, folder: Path | None = None, **environment: str) -> Run:
        if folder is None:
            folder = tmp_path_factory.mktemp("run") / "here"
            shutil.copytree(stages, folder)
        runs.append(Run(folder, *words, **environment))
        return runs[-1]

    yield start
    for run in runs:
        run.kill_all()
