"""A learner on a GPU against one on the CPU: the same numbers, in float32 and nearly so in half."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distrl.learn.learner import PolicyLearner
from distrl.learn.pretrain import save_examples
from distrl.learn.spec import Place
from tests.learn.rank_process import run, spec_of
from tests.learn.test_ranks import CASES, QUICK, STEPS, free_address

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

HALF: dict[str, dict[str, Any]] = {
    "half": {"dtype": "bfloat16"},
    "half_compiled": {"dtype": "bfloat16", "compile": True},
    "half_checkpointed": {"dtype": "bfloat16", "checkpoint_activations": True, "compile": True},
    "half_offloaded": {"dtype": "bfloat16", "offload": True},
}
"""Ways that a learner has on a GPU alone."""


@pytest.fixture(scope="module")
def told(tiny_policy, make_groups, tmp_path_factory):
    """`told(case, gpus, **ways)`: what a learner came to, and the weights it published."""
    root = tmp_path_factory.mktemp("gpu")
    batches = [make_groups(seed=step + 1) for step in range(STEPS)]
    save_examples([list(range(3, 3 + n)) for n in (4, 30, 9, 2, 17, 12)], root / "examples")
    made: dict[str, Any] = {}

    def tell(case: str, gpus: int, **ways: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        name = "_".join([case, str(gpus), *ways])
        if name not in made:
            folder = root / name
            folder.mkdir()
            config: dict[str, Any] = {"config": QUICK | CASES[case] | {"gpus": gpus} | ways}
            if case == "shared":
                config["examples"] = str(root / "examples")
            spec = spec_of({"policy": str(tiny_policy)}, config, folder)
            if spec.config.spread:
                spec = replace(spec, place=Place(address=free_address()))
            try:
                learner = PolicyLearner(spec)
                run(learner, config, batches, folder)
                learner.close()
            finally:
                if torch.distributed.is_initialized():  # it failed, and the next one may not
                    torch.distributed.destroy_process_group()
            told = json.loads((folder / "told.json").read_text())
            made[name] = told, load_file(folder / "published.safetensors")
        return made[name]

    return tell


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_comes_to_what_a_cpu_does(told, case):
    (cpu, weights), (gpu, found) = told(case, 0), told(case, 1)
    for one, other in zip(cpu["metrics"], gpu["metrics"], strict=True):
        timeless = [n for n in one if not n.startswith("time/") and n != "learn/padding"]
        assert other.keys() == one.keys()
        assert [other[n] for n in timeless] == pytest.approx([one[n] for n in timeless], abs=1e-4)
    assert gpu["probe"] == pytest.approx(cpu["probe"], abs=1e-4)
    torch.testing.assert_close(found, weights, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["ppo", "shared"])
def test_weights_that_wait_on_the_cpu_change_nothing(told, case):
    (here, weights), (there, found) = told(case, 1), told(case, 1, offload=True)
    assert there["probe"] == pytest.approx(here["probe"], abs=1e-5)
    torch.testing.assert_close(found, weights, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["ppo", "shared"])
@pytest.mark.parametrize("way", HALF)
def test_half_precision_stays_near(told, case, way):
    """The digits of bfloat16 are three; what is trained and published has those of float32."""
    (full, _), (half, found) = told(case, 1), told(case, 1, **HALF[way])
    assert {weight.dtype for weight in found.values()} == {torch.float32}
    for one, other in zip(full["metrics"], half["metrics"], strict=True):
        assert other["loss/policy"] == pytest.approx(one["loss/policy"], abs=0.02)
        assert other["grad/norm"] == pytest.approx(one["grad/norm"], rel=0.1)
        assert other["ppo/entropy"] == pytest.approx(one["ppo/entropy"], abs=0.02)
    assert half["probe"] == pytest.approx(full["probe"], abs=0.1)
