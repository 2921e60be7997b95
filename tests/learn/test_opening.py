"""The first minibatch is read once, and nothing else comes of it."""

from __future__ import annotations

import pytest
import torch

import distrl.learn.learner

RECIPES = {
    "ppo": {},
    "one minibatch": {"epochs": 1, "minibatches": 1},
    "shared": {"value": {"trunk": "shared", "start": "policy"}},
    "no critic": {"advantage": {"kind": "group", "whiten": False}},
    "entropy": {"objective": {"entropy_bonus": 0.01}},
    "leash in the loss": {"kl": {"place": "loss"}},
    "adapters": {"lora": {"rank": 4}},
    "trusted": {"trust_engine_logprobs": True},
    "activations anew": {"checkpoint_activations": True},
    "pads": {"packing": False},
}


def rows_read(module, monkeypatch):
    """How many sequences each pass over `module` reads from now on."""
    read, forward = [], module.forward

    def counting(ids_BL, *rest, **named):
        read.append(len(ids_BL))
        return forward(ids_BL, *rest, **named)

    monkeypatch.setattr(module, "forward", counting)
    return read


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_step_comes_to_the_same_with_one_pass_less(new_learner, make_groups, monkeypatch, recipe):
    groups = make_groups(seed=1, groups=4, samples=4)
    kept, anew = new_learner(**recipe), new_learner(**recipe)
    passes = {learner: rows_read(learner.networks.policy, monkeypatch) for learner in (kept, anew)}
    mine = kept.learn(groups).metrics
    monkeypatch.setattr(distrl.learn.learner, "read_opening", lambda *_: [])
    theirs = anew.learn(groups).metrics

    first = 16 // kept.config.minibatches
    saved = sum(passes[anew]) - sum(passes[kept])
    trusted = kept.config.trust_engine_logprobs  # the sampler here is not of the present weights
    assert saved == first or (trusted and saved >= first)
    for name in ("kl/ref", "grad/norm", "loss/policy", "ppo/entropy"):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-5), name
    assert mine.keys() == theirs.keys()
    for one, other in zip(kept.networks.trained, anew.networks.trained, strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


def test_the_first_gradient_sets_out_from_a_ratio_of_one(new_learner, make_groups):
    learner = new_learner(epochs=1, minibatches=1)
    metrics = learner.learn(make_groups(seed=1)).metrics
    assert metrics["ppo/approx_kl"] == 0 and metrics["ppo/clip_fraction"] == 0


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param({"micro_tokens": 64}, id="more than one pass"),
        pytest.param({"value": {"warmup_steps": 1}}, id="the critic learns alone"),
    ],
)
def test_nothing_is_kept_where_it_would_not_serve(new_learner, make_groups, monkeypatch, recipe):
    learner = new_learner(epochs=1, minibatches=1, **recipe)
    read = rows_read(learner.critic, monkeypatch)
    learner.learn(make_groups(seed=1, groups=4, samples=4))
    assert sum(read) == 32, "for the values, then for the gradient"
