"""Recording and replay: the same weights to the bit, and the first step that is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distrl.config import LearnConfig
from distrl.learn import record
from distrl.learn.learner import PolicyLearner
from distrl.learn.record import BadRecording, digest, recorded
from distrl.learn.replay import replay
from distrl.learn.spec import LearnerSpec


@pytest.fixture
def spec(tiny_policy, tmp_path):
    def make(recording=None, **config):
        learn = {"lr": 1e-3, "critic_lr": 1e-3, "warmup_steps": 0, "minibatches": 2, **config}
        return LearnerSpec(
            policy=tiny_policy,
            reward_model=None,
            config=LearnConfig.model_validate(learn),
            total_steps=10,
            total_samples=120,
            longest=12,
            temperature=1.0,
            seed=3,
            canary_tokens=8,
            scratch=tmp_path / "scratch",
            recording=recording,
            threads=1,
        )

    return make


@pytest.fixture
def recording(spec, make_groups, tmp_path):
    """Four recorded steps under an adaptive leash, and the digest of the weights after them."""
    folder = tmp_path / "recording"
    learner = PolicyLearner(spec(folder, kl={"kind": "adaptive", "target": 0.1, "horizon": 100}))
    for seed in range(4):
        learner.learn(make_groups(seed=seed), oldest=0)
    final = digest(*learner.networks.trained)
    learner.close()
    return folder, final


ADAPTIVE = {"kl": {"kind": "adaptive", "target": 0.1, "horizon": 100}}


def test_a_replay_gives_the_same_weights_to_the_bit(spec, recording):
    folder, final = recording
    seen = []
    done = replay(spec(**ADAPTIVE), folder, on_step=lambda step, equal: seen.append((step, equal)))
    assert (done.steps, done.differs, done.found) == (4, None, final)
    assert seen == [(1, True), (2, True), (3, True), (4, True)]
    assert replay(spec(**ADAPTIVE), folder, until=2).steps == 2


def test_another_setting_differs_at_the_first_step_it_touches(spec, recording):
    folder, _ = recording
    assert replay(spec(**ADAPTIVE, lr=2e-3), folder).differs == 1
    assert replay(spec(), folder).differs == 2, "the adaptive leash moves after step 1"


def test_a_batch_that_was_touched_differs_from_there_on(spec, recording):
    folder, _ = recording
    path = folder / "step_000003.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = file.metadata()
    tensors["scores_B"][0] += 1e-3
    save_file(tensors, path, meta)
    done = replay(spec(**ADAPTIVE), folder)
    assert (done.steps, done.differs) == (3, 3) and done.found != done.expected


def test_a_recording_that_cannot_be_read_says_where(spec, recording):
    folder, _ = recording
    (folder / "step_000002.safetensors").unlink()
    with pytest.raises(BadRecording, match="has no step 2"):
        replay(spec(), folder)
    (folder / "step_000002.safetensors").write_bytes(b"torn")
    with pytest.raises(BadRecording, match="step 2 cannot be read"):
        replay(spec(**ADAPTIVE), folder)
    with pytest.raises(BadRecording, match="no recorded step"):
        list(recorded(folder / "nothing"))


def test_a_resume_forgets_the_steps_it_takes_anew(spec, recording, make_groups, tmp_path):
    folder, _ = recording
    saver = PolicyLearner(spec(**ADAPTIVE))
    for kept in recorded(folder):
        saver.learn_from(kept.batch)
        if kept.step == 2:
            break
    saver.save(tmp_path / "saved")
    saver.close()
    resumed = PolicyLearner(spec(folder, **ADAPTIVE))
    resumed.load(tmp_path / "saved")
    assert [kept.step for kept in recorded(folder)] == [1, 2]
    resumed.learn(make_groups(seed=9))
    final = digest(*resumed.networks.trained)
    resumed.close()
    done = replay(spec(**ADAPTIVE), folder)
    assert (done.steps, done.differs, done.found) == (3, None, final)


@pytest.mark.parametrize("kind", ["linear", "fixed"])
def test_a_run_that_was_given_more_steps_is_replayed(spec, make_groups, tmp_path, kind):
    """Each step at the rate and the price of the plan that it was taken under."""
    planned = {"schedule": "linear", "kl": {"kind": kind, "coef": 0.2}}
    short = replace(spec(tmp_path / "kept", **planned), total_steps=4, total_samples=48)
    begun = PolicyLearner(short)
    for seed in range(3):
        begun.learn(make_groups(seed=seed))
    begun.save(tmp_path / "saved")
    begun.close()
    longer = PolicyLearner(spec(tmp_path / "kept", **planned))
    longer.load(tmp_path / "saved")
    longer.learn(make_groups(seed=3))
    longer.close()
    done = replay(spec(**planned), tmp_path / "kept")
    assert (done.steps, done.differs) == (4, None)


@pytest.mark.parametrize("ended", [True, False], ids=["full", "whole"])
def test_a_recording_that_ended_does_not_go_on_behind_a_gap(
    spec, make_groups, tmp_path, ended, caplog
):
    folder = tmp_path / "kept"
    begun = PolicyLearner(spec(folder, record_mib=0.001 if ended else 256))
    begun.learn(make_groups(seed=1))
    begun.learn(make_groups(seed=2))
    begun.save(tmp_path / "saved")
    begun.close()
    resumed = PolicyLearner(spec(folder))
    resumed.load(tmp_path / "saved")
    resumed.learn(make_groups(seed=3))
    resumed.close()
    there = sorted(path.name for path in folder.iterdir())
    assert there == ([] if ended else [f"step_{n:06d}.safetensors" for n in (1, 2, 3)])
    assert ("so it does not go on" in caplog.text) == ended


def test_steps_that_are_taken_anew_unrecorded_are_forgotten_too(
    spec, recording, make_groups, tmp_path
):
    folder, _ = recording
    saver = PolicyLearner(spec(**ADAPTIVE))
    saver.learn_from(next(iter(recorded(folder))).batch)
    saver.save(tmp_path / "saved")
    saver.close()
    resumed = PolicyLearner(spec(folder, record=False, **ADAPTIVE))
    resumed.load(tmp_path / "saved")
    resumed.close()
    assert [kept.step for kept in recorded(folder)] == [1]


def test_a_recording_is_bounded_in_bytes_and_can_be_off(spec, make_groups, tmp_path):
    small = PolicyLearner(spec(tmp_path / "small", record_mib=0.02))
    for seed in range(8):
        small.learn(make_groups(seed=seed))
    small.close()
    size = sum(path.stat().st_size for path in (tmp_path / "small").iterdir())
    assert 0 < size <= 0.02 * 2**20
    steps = [kept.step for kept in recorded(tmp_path / "small")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < 8
    off = PolicyLearner(spec(tmp_path / "off", record=False))
    off.learn(make_groups(seed=1))
    off.close()
    assert not (tmp_path / "off").exists()


def test_a_disk_that_refuses_ends_the_recording_and_not_the_run(
    spec, make_groups, tmp_path, monkeypatch, caplog
):
    def full(*_):
        raise OSError(28, "No space left on device")

    learner = PolicyLearner(spec(tmp_path / "recording"))
    learner.learn(make_groups(seed=1))
    monkeypatch.setattr(record, "save_file", full)
    assert learner.learn(make_groups(seed=2)).version == 2
    monkeypatch.undo()
    assert learner.learn(make_groups(seed=3)).version == 3
    learner.close()
    assert "recording ends before step 2: [Errno 28] No space left" in caplog.text
    assert [kept.step for kept in recorded(tmp_path / "recording")] == [1], "and leaves no gap"


def test_masked_tokens_are_out_of_the_gradient_and_in_the_replay(spec, make_groups, tmp_path):
    """With every token too old but those of version 0 upwards, nothing is learnt."""
    learner = PolicyLearner(spec(tmp_path / "masked"))
    before = digest(learner.policy)
    learner.learn(make_groups(seed=1), oldest=10**6)
    assert digest(learner.policy) == before, "no token reached the gradient"
    learner.learn(make_groups(seed=2), oldest=0)
    assert digest(learner.policy) != before
    learner.close()
    assert [kept.oldest for kept in recorded(tmp_path / "masked")] == [10**6, 0]
    assert replay(spec(), tmp_path / "masked").differs is None


def test_the_digest_sees_every_bit():
    module = torch.nn.Linear(3, 2)
    before = digest(module)
    with torch.no_grad():
        module.weight[0, 0] = torch.nextafter(module.weight[0, 0], torch.tensor(10.0))
    assert digest(module) != before
