"""What an engine finds in its environment, and in the folder of its model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from distrl.config import GenerateConfig
from distrl.generate.engine import ONE_PROCESS, EngineSpec, _environment, _executor
from distrl.models import load_policy
from distrl.models.sample import end_ids

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


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("named", [7, [9, 7], [9, 2], None])
def test_responses_end_where_those_of_plain_sampling_do(
    tiny_policy: Path, tmp_path: Path, file: str, named: int | list[int] | None
) -> None:
    """Those that the reward model's scale is measured on."""
    from vllm import SamplingParams
    from vllm.config import ModelConfig

    folder = shutil.copytree(tiny_policy, tmp_path / "policy")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    there = config if file == "config.json" else {}
    (folder / file).write_text(json.dumps(there | {"eos_token_id": named}))
    model = ModelConfig(model=str(folder), generation_config="vllm")
    params = SamplingParams()
    params.update_from_generation_config(model.try_get_generation_config(), 2)
    assert params.all_stop_token_ids == set(end_ids(load_policy(folder), 2))
