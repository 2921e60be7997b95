"""Settings drawn at random, not by hand: whatever is combined learns the same however it is
computed, goes on from its checkpoint to the bit, and publishes what it is."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distrl.learn.learner import PolicyLearner
from distrl.learn.pretrain import save_examples
from distrl.learn.spec import Place
from distrl.models.load import load_policy
from distrl.records import ScoredRollout, VersionSpan
from distrl.sync.canary import probe_logprobs
from distrl.sync.memory import whole
from tests.learn.test_ranks import free_address

DRAWS = 14


def settings(draw: random.Random) -> dict[str, Any]:
    """A `learn` section. Adam's epsilon is large, so that a rounding stays one."""
    kind = draw.choice(["clip", "sequence", "capped_weight", "kl_penalty", "policy_gradient"])
    aggregate = draw.choice(["token", "sequence", "constant"])
    anchor = draw.choice(["proximal", "behaviour"])
    place = draw.choice(["reward", "loss"])
    rank = draw.choice([0, 0, 4])
    found = {
        "advantage": {
            "kind": draw.choice(["gae", "group", "returns"]),
            "gamma": draw.choice([1.0, 0.97]),
            "lam": draw.choice([0.0, 0.95, 1.0]),
            "baseline": draw.choice(["mean", "leave_one_out", "none"]),
            "scale": draw.choice(["std", "none"]),
            "whiten": draw.random() < 0.5,
            "whiten_rewards": draw.random() < 0.3,
        },
        "objective": {
            "kind": kind,
            "aggregate": "sequence" if kind == "sequence" else aggregate,
            "entropy_bonus": draw.choice([0.0, 0.01]),
            "target_kl": draw.choice([None, None, 0.05]),
            "dual_clip": draw.choice([None, 3.0]),
            "penalty_target": draw.choice([None, 0.01]),
        },
        "off_policy": {
            "anchor": anchor,
            "weight": "none"
            if anchor == "behaviour"
            else draw.choice(["token", "sequence", "geometric", "none"]),
            "cap": draw.choice([1.0, 2.0]),
            "floor": draw.choice([0.0, 0.5]),
            "reject": draw.random() < 0.5,
        },
        "value": {
            "trunk": "separate" if rank else draw.choice(["separate", "shared"]),
            "start": "policy",
            "clip": draw.choice([None, 0.2]),
            "warmup_steps": draw.choice([0, 0, 1]),
        },
        "kl": {
            "place": place,
            "estimator": draw.choice(["k2", "k3"]),
            "kind": draw.choice(["fixed", "adaptive", "linear"]),
            "coef": draw.choice([0.0, 0.1]),
            "watch": draw.random() < 0.7,
        },
        "pretrain": {"coef": draw.choice([0.0, 0.5]), "sequences": draw.choice([1, 5])},
        "lora": {"rank": rank},
        "epochs": draw.choice([1, 2]),
        "minibatches": draw.choice([1, 2, 3]),
        "schedule": draw.choice(["constant", "linear", "cosine"]),
        "adam_epsilon_in": draw.choice(["torch", "tf"]),
        "adam_eps": 0.1,
        "lr": 3e-2,
        "critic_lr": 3e-2,
        "weight_decay": draw.choice([0.0, 0.1]),
        "ema": draw.choice([None, 0.9]),
        "trust_engine_logprobs": draw.random() < 0.3,
        "packing": draw.random() < 0.5,
        "checkpoint_activations": draw.random() < 0.5,
        "micro_tokens": draw.choice([16, 64, 2048]),
    }
    advantage, off_policy, kl = found["advantage"], found["off_policy"], found["kl"]
    advantage["whiten_rewards"] &= advantage["kind"] == "gae"
    if advantage["kind"] == "group" and advantage["baseline"] == "none":
        advantage["scale"] = "none"
    if kind == "policy_gradient":
        off_policy["anchor"] = "proximal"
    off_policy["reject"] &= off_policy["weight"] != "none"
    if kl["kind"] == "adaptive":
        kl["coef"] = 0.1
    return found


def of_two_versions(groups: Sequence[ScoredRollout], draw: random.Random) -> list[ScoredRollout]:
    """The same, each sample begun by version 0 and ended by version 1, or all by one of them."""

    def spans(tokens: int) -> tuple[VersionSpan, ...]:
        middle = draw.randint(0, tokens)
        both = [
            VersionSpan(version=v, start=s, end=e)
            for v, s, e in ((0, 0, middle), (1, middle, tokens))
        ]
        return tuple(span for span in both if span.end > span.start)

    return [
        replace(
            group,
            rollout=replace(
                group.rollout,
                samples=tuple(
                    replace(s, spans=spans(len(s.token_ids))) for s in group.rollout.samples
                ),
            ),
        )
        for group in groups
    ]


def weights(learner: PolicyLearner) -> dict[str, Tensor]:
    """All that it learns, the policy's as they are published."""
    found = {name: whole(w).clone() for name, w in learner.networks.policy_state().items()}
    if learner.critic is not None:
        critic = learner.critic.state_dict()
        found |= {f"critic.{name}": whole(w).clone() for name, w in critic.items()}
    return found


@pytest.mark.parametrize("seed", range(DRAWS))
def test_any_combination(seed, new_learner, make_groups, tiny_policy, tmp_path):
    draw = random.Random(seed)
    config, oldest = settings(draw), draw.choice([0, 1])
    batches = [
        make_groups(10 * seed + n, draw.choice([3, 6]), draw.choice([2, 4])) for n in range(3)
    ]
    batches[1:] = [of_two_versions(batch, draw) for batch in batches[1:]]
    save_examples([range(3, 5 + n) for n in range(7)], tmp_path / "examples")
    examples = tmp_path / "examples" if config["pretrain"]["coef"] else None

    def learned(**other: Any) -> PolicyLearner:
        learner = new_learner(examples, **config | other)
        for batch, limit in zip(batches, (0, oldest), strict=False):
            report = learner.learn(batch, oldest=limit)
            assert not report.skipped and all(map(math.isfinite, report.metrics.values()))
        return learner

    learner = learned()
    wanted = weights(learner)
    others = (
        {"threads": 2},
        {"micro_tokens": 32 if config["micro_tokens"] == 2048 else 2048},
        {"packing": not config["packing"]},
        {"checkpoint_activations": not config["checkpoint_activations"]},
        {"place": Place(address=free_address()), "threads": None},  # a rank that is alone
    )
    for other in others:
        another = learned(**other)
        found = weights(another)
        another.close()
        assert found.keys() == wanted.keys()
        for name, weight in found.items():
            torch.testing.assert_close(
                weight, wanted[name], atol=1e-5, rtol=1e-4, msg=f"{name}: {other}"
            )

    learner.save(tmp_path / "state")
    resumed = new_learner(examples, **config | others[3])
    resumed.load(tmp_path / "state")
    for going in (learner, resumed):
        going.learn(batches[2])
    wanted = weights(learner)
    for name, weight in weights(resumed).items():
        assert torch.equal(weight, wanted[name]), name

    published = learner.publish()
    copy = load_policy(tiny_policy)
    copy.load_state_dict({n: w for n, w in wanted.items() if not n.startswith("critic.")})
    gaps = torch.from_numpy(probe_logprobs(copy, published.probe_ids) - published.probe_logprobs)
    assert gaps.abs().max() < 1e-4
