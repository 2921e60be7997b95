"""A learner of two processes comes to what a learner of one does, and takes up its state."""

from __future__ import annotations

import functools
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distrl.learn.learner import PolicyLearner
from distrl.learn.pretrain import save_examples
from distrl.learn.spec import Place
from distrl.learn.state import StateMismatch
from distrl.models.load import load_policy
from distrl.sync.memory import whole
from tests.learn.rank_process import run, spec_of

QUICK = {"lr": 1e-3, "critic_lr": 1e-3, "warmup_steps": 0, "minibatches": 2, "record": False}
CASES = {
    "ppo": {"kl": {"kind": "adaptive", "coef": 0.2}, "micro_tokens": 64},
    "shared": {
        "value": {"trunk": "shared", "start": "policy"},
        "pretrain": {"coef": 2.0, "sequences": 5},
        "ema": 0.9,
        "adam_epsilon_in": "tf",
        "trust_engine_logprobs": True,
    },
    "grpo_lora": {
        "advantage": {"kind": "group", "whiten": False},
        "objective": {"aggregate": "sequence", "entropy_bonus": 0.01},
        "kl": {"place": "loss"},
        "lora": {"rank": 4, "alpha": 8},
    },
    "checkpointed": {"checkpoint_activations": True, "epochs": 2},
    "compiled": {"compile": True, "objective": {"entropy_bonus": 0.01}},
}
STEPS = 3
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(scope="module")
def job(tiny_policy, tmp_path_factory):
    """What is to be run, and below which folder."""
    root = tmp_path_factory.mktemp("ranks")
    examples = root / "examples.safetensors"
    save_examples([list(range(3, 3 + n)) for n in (4, 30, 9, 2, 17, 12)], examples)
    cases = {
        name: {"config": QUICK | config, "examples": str(examples) if name == "shared" else None}
        for name, config in CASES.items()
    }
    cases["halves"] = cases["ppo"]
    return root, {"world": 2, "policy": str(tiny_policy), "cases": cases}


@pytest.fixture(scope="module")
def alone(job, make_groups):
    """`alone(case)`: the folder of one process that ran it; of "halves" the first step of "ppo"."""
    root, job = job

    @functools.cache
    def ran(name: str) -> Path:
        folder = root / "alone" / name
        folder.mkdir(parents=True)
        learner = PolicyLearner(spec_of(job, job["cases"][name], folder))
        batches = [make_groups(seed=step + 1) for step in range(1 if name == "halves" else STEPS)]
        run(learner, job["cases"][name], batches, folder)
        learner.close()
        return folder

    return ran


@pytest.fixture(scope="module")
def both(job, alone, make_groups):
    """`both(case)`: the folder of two processes that run all cases, one after the other, once that
    one is done; "halves" goes on from what the one process saved."""
    root, job = job
    resumed = job["cases"]["ppo"] | {"resume": str(alone("halves") / "checkpoint")}
    cases = job["cases"] | {"halves": resumed}
    addressed = {name: case | {"address": free_address()} for name, case in cases.items()}
    folder = root / "both"
    for name in cases:
        (folder / name).mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(job | {"cases": addressed}))
    batches = [make_groups(seed=step + 1) for step in range(STEPS)]
    (folder / "batches.pickle").write_bytes(pickle.dumps(batches))
    script = Path(__file__).parent / "rank_process.py"
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with (folder / "said").open("w") as said:
        processes = [
            subprocess.Popen(
                [sys.executable, script, folder, str(rank)],
                env=env,
                stdout=said,
                stderr=subprocess.STDOUT,
            )
            for rank in range(job["world"])
        ]

    def ran(name: str) -> Path:
        while not all((folder / name / f"done.{rank}").exists() for rank in range(job["world"])):
            ended = [process.poll() for process in processes]
            assert not any(ended), (folder / "said").read_text()
            time.sleep(0.1)
        return folder / name

    yield ran
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_rank_that_is_alone_comes_to_the_same(job, alone, case, make_groups, tmp_path):
    """It has all weights whole at once, and lets go of them after each pass."""
    _, job = job
    config = job["cases"][case]
    spec = spec_of(job, config, tmp_path)
    learner = PolicyLearner(replace(spec, place=Place(address=free_address())))
    try:
        run(learner, config, [make_groups(seed=step + 1) for step in range(STEPS)], tmp_path)
    finally:
        learner.close()
    wanted = json.loads((alone(case) / "told.json").read_text())
    found = json.loads((tmp_path / "told.json").read_text())
    for one, other in zip(wanted["metrics"], found["metrics"], strict=True):
        timeless = [n for n in one if not n.startswith("time/")]
        assert [other[n] for n in timeless] == pytest.approx([one[n] for n in timeless], abs=1e-5)
    assert found["probe"] == pytest.approx(wanted["probe"], abs=1e-5)
    published = [load_file(f / "published.safetensors") for f in (alone(case), tmp_path)]
    torch.testing.assert_close(published[1], published[0], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_come_to_what_one_does(alone, both, case):
    folders = both(case), alone(case)
    told, wanted = (json.loads((folder / "told.json").read_text()) for folder in folders)
    assert len(wanted["metrics"]) == STEPS
    for one, two in zip(wanted["metrics"], told["metrics"], strict=True):
        timeless = [n for n in one if not n.startswith("time/") and n != "learn/padding"]
        assert two.keys() == one.keys()
        assert [two[n] for n in timeless] == pytest.approx([one[n] for n in timeless], abs=1e-5)
    assert told["probe"] == pytest.approx(wanted["probe"], abs=1e-5)
    published = [load_file(folder / "published.safetensors") for folder in folders]
    torch.testing.assert_close(*published, **CLOSE)
    exported = [load_policy(folder / "policy").state_dict() for folder in folders]
    torch.testing.assert_close(*exported, **CLOSE)


@pytest.mark.slow
def test_two_ranks_take_up_what_one_saved(alone, both):
    unbroken = load_file(alone("ppo") / "published.safetensors")
    resumed = load_file(both("halves") / "published.safetensors")
    torch.testing.assert_close(resumed, unbroken, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_takes_up_what_two_ranks_saved(job, alone, both, case, make_groups, tmp_path):
    _, job = job
    found = []
    for folder in (alone(case), both(case)):
        learner = PolicyLearner(spec_of(job, job["cases"][case], tmp_path))
        learner.load(folder / "checkpoint")
        assert learner.step == STEPS
        learner.learn(make_groups(seed=9))
        state = learner.networks.policy_state()
        found.append({name: whole(weight) for name, weight in state.items()})
        learner.close()
    torch.testing.assert_close(found[1], found[0], **CLOSE)


@pytest.mark.slow
def test_each_rank_keeps_its_half_alone(alone, both):
    halves = sorted((both("ppo") / "checkpoint").glob("policy.*-of-*.safetensors"))
    assert [half.name for half in halves] == [
        "policy.00000-of-00002.safetensors",
        "policy.00001-of-00002.safetensors",
    ]
    whole = load_file(alone("ppo") / "checkpoint" / "policy.safetensors")
    parts = [load_file(half) for half in halves]
    for name, tensor in whole.items():
        if "rotary" not in name:
            torch.testing.assert_close(torch.cat([part[name] for part in parts]), tensor, **CLOSE)


@pytest.mark.slow
def test_a_file_that_is_missing_is_named(both, tiny_policy, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in (both("ppo") / "checkpoint").iterdir():
        if path.name != "critic.00001-of-00002.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    job, config = {"policy": str(tiny_policy)}, {"config": QUICK | CASES["ppo"]}
    learner = PolicyLearner(spec_of(job, config, tmp_path))
    with pytest.raises(StateMismatch, match=r"critic.safetensors .* of 2 ranks' files 1 are"):
        learner.load(folder)
    learner.close()


@pytest.mark.slow
def test_passes_in_bfloat16_train_float32_weights(alone, tiny_policy, make_groups, tmp_path):
    """One rank, in two precisions: near the run in float32, and nothing of it is kept in half."""
    half = {"config": QUICK | CASES["ppo"] | {"dtype": "bfloat16"}}
    spec = spec_of({"policy": str(tiny_policy)}, half, tmp_path)
    learner = PolicyLearner(replace(spec, place=Place(address=free_address())))
    try:
        reports = [learner.learn(make_groups(seed=step + 1)) for step in range(STEPS)]
        assert all(p.dtype == torch.float32 for p in learner.policy.parameters())
        learner.publish()
        learner.save(tmp_path / "checkpoint")
        learner.export(tmp_path / "policy")
        learner.load(tmp_path / "checkpoint")
    finally:
        learner.close()
    told = json.loads((alone("ppo") / "told.json").read_text())["metrics"][-1]
    for name in ("ppo/entropy", "value/mean", "kl/ref"):
        assert reports[-1].metrics[name] == pytest.approx(told[name], rel=0.05, abs=0.05)
    exact = load_file(alone("ppo") / "checkpoint" / "policy.safetensors")
    found = load_file(tmp_path / "checkpoint" / "policy.safetensors")
    exported = load_policy(tmp_path / "policy").state_dict()
    assert all(torch.equal(exported[n], found[n]) for n in exported if n in found)
    start = load_policy(tiny_policy).state_dict()
    moved = {n: exact[n] - start[n] for n in start if n in exact}
    error = {n: found[n] - exact[n] for n in moved}
    total = [sum(float(t.square().sum()) for t in of.values()) for of in (moved, error)]
    assert 0 < total[1] < 0.3 * total[0], "other roundings, the same direction"
