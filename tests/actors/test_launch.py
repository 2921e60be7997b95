"""What each actor of a run is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distrl.actors.handles import ASIDE
from distrl.actors.launch import _Maker, learner_spec
from distrl.config import Config
from distrl.generate.engine import EngineSpec
from distrl.learn.allocator import from_the_start


class Noted(_Maker):
    """Makes no actor: notes what it would be made of."""

    def __init__(self, folder: Path, step: int = 0, **sections: Any) -> None:
        super().__init__({}, {}, Config.model_validate(sections), folder, folder, step)
        self.specs: list[EngineSpec] = []
        self.groups: Any = None
        self.surroundings: dict[str, Any] = {}

    def _actor(self, role: str, place: int, cls: type, groups: Any = None, **options: Any) -> Any:
        self.groups = groups
        self.surroundings[role] = options.get("runtime_env")
        return SimpleNamespace(remote=lambda *given: self.specs.append(given[1]))


def seeds(maker: Noted, place: int, starts: int) -> list[int]:
    handle = maker.generator(place, SimpleNamespace())  # type: ignore[arg-type]
    maker.specs.clear()
    for _ in range(starts):
        handle._make()
    return [spec.seed for spec in maker.specs]


def test_no_sampler_draws_the_same_random_numbers_twice(tmp_path: Path) -> None:
    """Neither that of another generator or run, nor that of a restart or a resume."""
    drawn = [
        seed
        for run in (0, 1)
        for step in (0, 1, 20)
        for place in (0, 1)
        for seed in seeds(Noted(tmp_path, step, run={"seed": run}), place, starts=3)
    ]
    assert len(set(drawn)) == len(drawn) == 36
    assert all(0 <= seed < 2**32 for seed in drawn)


def test_the_same_run_draws_the_same(tmp_path: Path) -> None:
    assert seeds(Noted(tmp_path), 1, starts=3) == seeds(Noted(tmp_path), 1, starts=3)


@pytest.mark.parametrize(
    ("sections", "beside"),
    [
        ({}, False),
        ({"sync": {"transport": "gloo"}}, True),
        ({"cluster": {"address": "auto"}}, True),
    ],
)
def test_what_a_sync_asks_of_the_learner_does_not_wait_for_its_step(
    sections: dict[str, Any], beside: bool, tmp_path: Path
) -> None:
    """Where it asks anything; its deadline is the configured one."""
    sync = {"timeout_s": 7, **sections.pop("sync", {})}
    maker = Noted(tmp_path, **sections, sync=sync)
    learner = maker.learner(learner_spec(maker.config, tmp_path, None, tmp_path))
    assert (maker.groups is not None and ASIDE in maker.groups) == beside
    assert learner.sync_timeout_s == maker.generator(0, learner).sync_timeout_s == 7


def test_those_with_passes_to_make_start_with_the_allocator_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=9")
    maker = Noted(tmp_path)
    learner = maker.learner(learner_spec(maker.config, tmp_path, None, tmp_path))
    maker.scorer(0)
    maker.generator(0, learner)
    wanted = {"env_vars": from_the_start()}
    assert maker.surroundings == {"learner": wanted, "scorer": wanted, "generator": None}
    last = wanted["env_vars"]["GLIBC_TUNABLES"].split(":")[-1]
    assert last == "glibc.malloc.tcache_count=9", "the user's own is kept"
