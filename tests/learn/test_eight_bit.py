"""Adam in 8 bits: AdamW's course in a quarter of its memory, and a state that others take up.

torchao is for those who ask for it, as transformers imports it wherever it finds it. So it is
fetched for this test, into a folder that one process alone looks into.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from distrl.cli.checks import check_models
from distrl.config import Config, ConfigError, LearnConfig

EXTRA = "eight-bit"


@pytest.fixture(scope="module")
def torchao(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("torchao")
    asked = map(Requirement, requires("distrl") or ())
    (wanted,) = [
        f"{one.name}{one.specifier}"
        for one in asked
        if one.marker is not None and one.marker.evaluate({"extra": EXTRA})
    ]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wanted]
    subprocess.run(pip, check=True)
    return folder


@pytest.mark.slow  # its steps are compiled
def test_it_follows_adamw_and_either_goes_on_from_the_others_state(
    torchao, tiny_policy, make_groups, tmp_path
):
    config = {"lr": 1e-3, "critic_lr": 1e-3, "warmup_steps": 0, "minibatches": 2}
    job = {"policy": str(tiny_policy), "config": config, "world": 1}
    (tmp_path / "job.json").write_text(json.dumps(job))
    batches = [make_groups(seed) for seed in (1, 2, 3, 4)]
    (tmp_path / "batches.pickle").write_bytes(pickle.dumps(batches))
    script = Path(__file__).with_name("eight_bit_process.py")
    env = os.environ | {"PYTHONPATH": str(torchao)}
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    # Where a gradient is tiny, Adam's step is not, and of a tiny model's gradients most are.
    assert 0 < seen["apart"] < 0.5 * seen["travelled"]
    assert 0.24 < seen["bytes"] < 0.27
    assert seen["goes on"] < 0.1 * seen["anew"]
    assert 0.9 < seen["largest"] < 1.5, "what is rarely seen does not leap"
    assert seen["widened"], "AdamW of 32 bits has taken up another state"


def test_what_does_not_go_with_it_is_refused():
    with pytest.raises(ValueError, match=r"learn\.adam_epsilon_in=torch"):
        LearnConfig(adam_bits=8, adam_epsilon_in="tf")
    with pytest.raises(ValueError, match=r"Adam of 32 bits; set learn\.record=false"):
        LearnConfig(adam_bits=8, record=True)


def test_who_has_no_torchao_is_told_where_it_comes_from(tiny_policy):
    config = Config(learn=LearnConfig(adam_bits=8))
    with pytest.raises(ConfigError, match=r"pip install 'distrl\[eight-bit\]'"):
        check_models(config, tiny_policy, None)
