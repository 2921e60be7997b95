"""A learner whose passes are shared by threads comes to what one thread comes to."""

from __future__ import annotations

import threading

import pytest
import torch

from distrl.learn.pretrain import save_examples

from .test_algorithms import VARIANTS

MANY = {
    "several passes a thread": {"micro_tokens": 96},
    "one sequence a minibatch": {"minibatches": 12},
    "pads": {"packing": False},
    "activations anew": {"checkpoint_activations": True},
    "trusted": {"trust_engine_logprobs": True},
}
RECIPES = VARIANTS | MANY


def weights(learner):
    return [p.detach() for part in learner.networks.trained for p in part.parameters()]


@pytest.mark.parametrize("name", RECIPES)
def test_threads_come_to_what_one_comes_to(new_learner, make_groups, name):
    config = RECIPES[name]
    one, two = new_learner(**config), new_learner(threads=2, **config)
    assert (one.ranks.crew.size, two.ranks.crew.size) == (1, 2)
    for seed in (1, 2):
        theirs, mine = (x.learn(make_groups(seed=seed)).metrics for x in (one, two))
    assert mine.keys() == theirs.keys()
    for metric in mine.keys() - {"time/learn_compute", "learn/padding"}:
        assert mine[metric] == pytest.approx(theirs[metric], abs=2e-4, rel=2e-3), metric
    for a, b in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0)


def test_threads_come_to_the_same_bits_every_time(new_learner, make_groups):
    runs = [new_learner(threads=3, micro_tokens=96) for _ in range(2)]
    for learner in runs:
        for seed in (1, 2):
            learner.learn(make_groups(seed=seed, groups=4, samples=3))
    assert all(map(torch.equal, *map(weights, runs)))


def test_examples_of_pretraining_are_shared_as_well(new_learner, make_groups, tmp_path):
    rows = [torch.arange(3, 3 + n) for n in (5, 9, 2, 7, 6)]
    save_examples([row.tolist() for row in rows], tmp_path / "examples.safetensors")
    config = {"pretrain": {"coef": 0.5, "sequences": 4}, "micro_tokens": 32}
    path = tmp_path / "examples.safetensors"
    one = new_learner(examples=path, **config)
    two = new_learner(examples=path, threads=2, **config)
    theirs, mine = (x.learn(make_groups(seed=1)).metrics for x in (one, two))
    assert mine["loss/pretrain"] == pytest.approx(theirs["loss/pretrain"], rel=1e-5)
    assert mine["grad/norm"] == pytest.approx(theirs["grad/norm"], rel=1e-4)


def test_each_thread_reads_its_own_sequences(new_learner, make_groups, monkeypatch):
    learner = new_learner(threads=2, epochs=1, minibatches=1)
    read: dict[str, int] = {}
    policy = learner.networks.policy
    forward = policy.forward
    both = threading.Barrier(2, timeout=60)  # one thread alone would wait here

    def noted(ids_BL, *rest, **named):
        both.wait()
        read[threading.current_thread().name] = len(ids_BL)
        return forward(ids_BL, *rest, **named)

    monkeypatch.setattr(policy, "forward", noted)
    learner.learn(make_groups(seed=1, groups=4, samples=4))
    assert len(read) == 2 and sum(read.values()) == 16


def test_one_thread_writes_the_weights_and_another_reads_the_probe(new_learner, monkeypatch):
    learner = new_learner(threads=2)
    both = threading.Barrier(2, timeout=60)
    for part, name in ((learner.networks.policy, "forward"), (learner.publisher, "publish")):
        work = getattr(part, name)

        def waits(*words, work=work):
            both.wait()
            return work(*words)

        monkeypatch.setattr(part, name, waits)
    assert learner.publish().version == 0


def test_a_thread_that_is_held_up_leaves_the_rest_to_the_other(
    new_learner, make_groups, monkeypatch
):
    """Something else wants its core: the critic's two passes are made meanwhile."""
    learner = new_learner(threads=2, epochs=1, minibatches=1)
    policy, critic = learner.networks.policy, learner.networks.critic
    passes = {network: network.forward for network in (policy, critic)}
    first, values, in_time = threading.Lock(), threading.Semaphore(0), []

    def held_up(*words, **named):
        if first.acquire(blocking=False):
            in_time.extend(values.acquire(timeout=60) for _ in range(2))
        return passes[policy](*words, **named)

    def counted(*words, **named):
        try:
            return passes[critic](*words, **named)
        finally:
            values.release()

    monkeypatch.setattr(policy, "forward", held_up)
    monkeypatch.setattr(critic, "forward", counted)
    learner.learn(make_groups(seed=1, groups=4, samples=4))
    assert in_time == [True, True]
