"""What an engine's process finds in its environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrl.config import GenerateConfig
from distrl.generate.engine import ONE_PROCESS, EngineSpec, _environment, _executor

KEPT = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def test_memory_is_kept_on_a_cpu_as_we_set_it_or_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = EngineSpec(model=Path("policy"), config=GenerateConfig(), max_model_len=64, seed=1)
    monkeypatch.delenv(KEPT, raising=False)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=9")
    environment = _environment(spec)
    assert int(environment[KEPT]) < 1024
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.tcache_count=9"
    monkeypatch.setenv(KEPT, "7")
    assert _environment(spec)[KEPT] == "7"


def test_on_a_gpu_it_is_left_alone() -> None:
    spec = EngineSpec(model=Path("policy"), config=GenerateConfig(gpus=1), max_model_len=64, seed=1)
    assert not {KEPT, "GLIBC_TUNABLES"} & _environment(spec).keys()


def test_several_gpus_are_one_actors_and_not_rays_to_place() -> None:
    """vLLM, left to itself in an actor, wants a bundle for each GPU."""
    for gpus, executor in ((0, ONE_PROCESS), (0.5, None), (1, None), (2, "mp")):
        config = GenerateConfig(gpus=gpus)
        spec = EngineSpec(model=Path("policy"), config=config, max_model_len=64, seed=1)
        assert _executor(spec) == executor
