"""What the `learn` section composes: advantages, objectives, leashes, critics, averages."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from distrl.algo import Surrogate
from distrl.config import AdvantageConfig, ConfigError, LearnConfig, ObjectiveConfig
from distrl.disk import NotWritten
from distrl.learn.advantages import Outcome, estimate, estimator
from distrl.learn.average import WeightAverage
from distrl.learn.experience import to_experience
from distrl.learn.forward import PolicyModel, response_logprobs
from distrl.learn.networks import Networks
from distrl.learn.objectives import Tokens, objective, surrogate
from distrl.learn.optimizer import TFAdamW
from distrl.learn.pretrain import Examples, save_examples
from distrl.learn.rehearse import rehearse
from distrl.learn.update import minibatches, pretrain_backward
from distrl.metrics.names import unknown_names
from distrl.models.load import load_policy
from distrl.records import RolloutBatch

OWN = "tests.learn.own_algorithm"
VARIANTS = {
    "grpo": {
        "advantage": {"kind": "group", "whiten": False},
        "objective": {"aggregate": "sequence"},
        "kl": {"place": "loss"},
    },
    "dr_grpo": {
        "advantage": {"kind": "group", "scale": "none", "whiten": False},
        "objective": {"aggregate": "constant"},
    },
    "rloo": {
        "advantage": {
            "kind": "group", "baseline": "leave_one_out", "scale": "none", "whiten": False
        },
    },
    "dapo": {
        "advantage": {"kind": "group", "whiten": False}, "objective": {"clip_high": 0.28},
        "kl": {"coef": 0.0},
    },
    "dual_clip": {"objective": {"dual_clip": 3.0}},
    "reinforce": {
        "advantage": {"kind": "returns", "whiten": False}, "objective": {"kind": "policy_gradient"}
    },
    "reinforce++": {"advantage": {"kind": "returns"}},
    "reinforce++-baseline": {"advantage": {"kind": "group", "scale": "none"}},
    "sequence weights": {"off_policy": {"weight": "sequence"}},
    "geometric weights": {"off_policy": {"weight": "geometric"}},
    "a2c": {"advantage": {"lam": 1.0}, "objective": {"kind": "policy_gradient"}},
    "gspo": {
        "advantage": {"kind": "group", "whiten": False},
        "objective": {"kind": "sequence", "aggregate": "sequence"},
    },
    "cispo": {"objective": {"kind": "capped_weight", "clip_low": 1.0, "clip_high": 3.0}},
    "penalty": {"objective": {"kind": "kl_penalty", "penalty_target": 0.01}},
    "shared": {"value": {"trunk": "shared", "start": "policy"}},
    "behaviour": {"off_policy": {"anchor": "behaviour", "weight": "none"}},
    "icepop": {"off_policy": {"reject": True, "cap": 1.05, "floor": 0.95}},
    "linear": {"kl": {"kind": "linear", "coef": 0.2, "final": 0.1}},
    "entropy": {"objective": {"entropy_bonus": 0.01}},
    "tf": {"adam_epsilon_in": "tf", "adam_eps": 1e-5},
    "lora": {"lora": {"rank": 4}},
    "unwatched": {"kl": {"coef": 0.0, "watch": False}},
    "own": {
        "advantage": {"kind": f"{OWN}:best_of_group", "whiten": False},
        "objective": {"kind": f"{OWN}:likelihood"},
    },
}  # fmt: skip


def policy_of(learner):
    return [p.detach().clone() for p in learner.policy.parameters()]


def moved(learner, before):
    return any(not torch.equal(a, b) for a, b in zip(before, policy_of(learner), strict=True))


# -- every variant learns, saves and goes on ---------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_steps_saves_and_goes_on_as_if_never_stopped(
    new_learner, make_groups, tmp_path, name
):
    config = VARIANTS[name] | {"ema": 0.9}
    unbroken, first = new_learner(**config), new_learner(**config)
    before = policy_of(first)
    metrics = first.learn(make_groups(seed=1)).metrics
    assert unknown_names(metrics) == [] and all(map(math.isfinite, metrics.values()))
    assert moved(first, before)
    first.learn(make_groups(seed=2))
    first.save(tmp_path / "state")
    resumed = new_learner(**config)
    resumed.load(tmp_path / "state")
    for seed in (1, 2, 3):
        whole = unbroken.learn(make_groups(seed=seed))
    again = resumed.learn(make_groups(seed=3))
    untimed = [{k: v for k, v in r.metrics.items() if "time/" not in k} for r in (whole, again)]
    assert untimed[0] == untimed[1]
    for part, other in zip(unbroken.networks.trained, resumed.networks.trained, strict=True):
        assert all(map(torch.equal, part.parameters(), other.parameters()))
    assert unbroken.average is not None and resumed.average is not None
    mine, theirs = unbroken.average.weights, resumed.average.weights
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_only_what_needs_a_critic_has_one(new_learner, make_groups):
    learner = new_learner(**VARIANTS["grpo"])
    assert learner.critic is None and len(learner.optimizers) == 1
    assert not [k for k in learner.learn(make_groups(seed=1)).metrics if k.startswith("value/")]
    shared = new_learner(**VARIANTS["shared"])
    body = {id(p) for p in shared.policy.parameters()}
    assert {id(p) for p in shared.networks.trained[1].parameters()}.isdisjoint(body)
    assert len(list(shared.networks.trained[1].parameters())) == 2, "the head alone"


def test_no_reference_is_there_where_nobody_asks(new_learner, make_groups):
    learner = new_learner(**VARIANTS["unwatched"])
    assert learner.networks.reference is None
    assert "kl/ref" not in learner.learn(make_groups(seed=1)).metrics


def test_the_price_of_kl_follows_its_kind(new_learner, make_groups):
    coefs = {}
    for kind in ("fixed", "linear"):
        learner = new_learner(kl={"kind": kind, "coef": 0.2, "final": 0.1})
        coefs[kind] = [learner.learn(make_groups(1)).metrics["kl/coef"] for _ in range(3)]
    assert coefs["fixed"] == [0.2] * 3
    assert coefs["linear"] == pytest.approx([0.2, 0.19, 0.18]), "12 of 120 samples a step"


def test_kl_in_the_loss_is_not_in_the_rewards_as_well(new_learner, make_groups):
    """From the second step on the policy has left its reference, and each place has its effect."""
    losses = {}
    for place, coef in (("loss", 0.0), ("loss", 50.0), ("reward", 50.0)):
        learner = new_learner(kl={"place": place, "coef": coef}, advantage={"whiten": False})
        learner.learn(make_groups(seed=1))
        metrics = learner.learn(make_groups(seed=2)).metrics
        losses[place, coef] = (metrics["loss/policy"], metrics["value/mean"])
    assert losses["loss", 50.0][0] > losses["loss", 0.0][0] + 1e-3
    assert losses["reward", 50.0] != losses["loss", 50.0]


# -- advantages ---------------------------------------------------------------------------


def outcome(samples=3):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4, 2, 1, 3, 4, 2])
    mask = torch.arange(4) < lengths[:, None]
    rewards = torch.randn(6, 4, generator=generator) * mask
    return Outcome(rewards_BT=rewards, values_BT=None, mask_BT=mask, samples=samples)


def test_a_groups_rewards_are_held_against_each_other():
    made = outcome()
    config = AdvantageConfig(kind="group", baseline="leave_one_out", scale="none", whiten=False)
    found = estimate(made, config).advantages
    totals = made.rewards_BT.sum(1).tolist()
    for row, total in enumerate(totals):
        first = row - row % 3
        others = [t for i, t in enumerate(totals[first : first + 3]) if first + i != row]
        wanted = total - sum(others) / 2
        n = int(made.mask_BT[row].sum())
        assert found[row, :n].tolist() == pytest.approx([wanted] * n, abs=1e-5)
        assert not found[row, n:].any()


def test_returns_are_the_rewards_to_come_discounted():
    made = outcome()
    config = AdvantageConfig(kind="returns", gamma=0.9, whiten=False)
    found = estimate(made, config).advantages
    for row in range(6):
        n = int(made.mask_BT[row].sum())
        for t in range(n):
            wanted = sum(0.9 ** (k - t) * made.rewards_BT[row, k].item() for k in range(t, n))
            assert found[row, t].item() == pytest.approx(wanted, abs=1e-5)


def test_names_that_are_not_there_are_refused_with_the_fix():
    with pytest.raises(ValueError, match="choose one of gae, group, returns, or name a function"):
        AdvantageConfig(kind="gea")
    with pytest.raises(ConfigError, match="cannot import no_such_module"):
        estimator("no_such_module:f")
    with pytest.raises(ConfigError, match=rf"{OWN} has no worst; it has .*likelihood"):
        objective(f"{OWN}:worst")
    config = AdvantageConfig(kind="tests.learn.test_algorithms:misshapen")
    with pytest.raises(ValueError, match=r"gave advantages of shape \(6, 1\); \(6, 4\) was due"):
        estimate(outcome(), config)


def test_what_an_own_objective_answers_is_looked_at():
    nothing = torch.zeros(2, 3)
    tokens = Tokens(
        logprobs=nothing, old=nothing, advantages=nothing, mask=nothing > -1, penalty=1.0
    )
    here = "tests.learn.test_algorithms"
    for name, was in (("a_number", "Tensor"), ("too_short", r"\(2, 1\)")):
        with pytest.raises(ConfigError, match=rf"kind={here}:{name} gave {was}; a Surrogate"):
            surrogate(tokens, ObjectiveConfig(kind=f"{here}:{name}"))
    with pytest.raises(ConfigError, match=rf"{here}:a_number gave Tensor; Advantages were due"):
        estimate(outcome(), AdvantageConfig(kind=f"{here}:a_number"))
    assert surrogate(tokens, ObjectiveConfig()).loss.shape == (2, 3)


@pytest.mark.parametrize(
    "kinds, message",
    [
        ({"objective": "breaks"}, r"objective.kind '.*:breaks' failed: Att.*_algorithms.py, line "),
        ({"advantage": "breaks"}, r"advantage.kind '.*:breaks' failed: Att.*_algorithms.py, line "),
        ({"objective": "takes_one"}, r":takes_one' failed: TypeError: .* were given$"),
        ({"objective": "constant"}, "a loss without a gradient; compute it from tokens.logprobs"),
        ({"advantage": "misshapen"}, r"gave advantages of shape \(6, 1\); \(6, 4\) was due"),
        ({"objective": "too_short"}, r"gave \(2, 1\); a Surrogate with a loss .* \(6, 4\)"),
    ],
)  # fmt: skip
def test_own_functions_are_tried_before_anything_starts(kinds, message):
    here = "tests.learn.test_algorithms"
    config = {part: {"kind": f"{here}:{name}"} for part, name in kinds.items()}
    with pytest.raises(ConfigError, match=message):
        rehearse(LearnConfig.model_validate(config), samples=3)


def test_own_functions_that_work_pass_whatever_the_group():
    config = LearnConfig.model_validate(VARIANTS["own"])
    for samples in (1, 3):
        rehearse(config, samples)
    rehearse(LearnConfig(), 1)


def breaks(first, config):
    return first.gain


def takes_one(tokens):
    return tokens


def constant(tokens, config):
    nothing = torch.zeros_like(tokens.old)
    return Surrogate(loss=nothing, clipped=nothing, ratio=nothing)


def a_number(tokens, config):
    return torch.zeros(())


def too_short(tokens, config):
    nothing = torch.zeros(2, 1)
    return Surrogate(loss=nothing, clipped=nothing, ratio=nothing)


def misshapen(made, config):
    return dataclasses.replace(
        estimate(made, AdvantageConfig(kind="returns")), advantages=torch.zeros(6, 1)
    )


# -- off-policy: what the engine said ------------------------------------------------------


def fresh(learner, groups):
    """The groups with the log-probabilities that the learner itself would give."""
    from distrl.learn.prepare import prepare

    batch = to_experience(RolloutBatch(groups=tuple(groups)))
    known = prepare(batch, learner.networks, learner.config, temperature=1.0, kl_coef=0.0)
    return dataclasses.replace(batch, behaviour_BT=known.proximal)


def count_passes(learner, monkeypatch):
    read = []
    body = learner.policy.base_model
    forward = body.forward

    def counting(*args, **rest):
        read.append(int((rest["position_ids"] == 0).sum()))
        return forward(*args, **rest)

    monkeypatch.setattr(body, "forward", counting)
    return read


@pytest.mark.parametrize(
    ("micro_tokens", "wanted"),
    [
        pytest.param(2048, 32, id="the first minibatch is the sample, and read once"),
        pytest.param(64, 2 + 32, id="every sixteenth of 32 is computed, then all learn"),
    ],
)
def test_trusted_logprobs_save_the_pass_and_are_checked(
    new_learner, make_groups, monkeypatch, micro_tokens, wanted
):
    groups = make_groups(seed=1, groups=8, samples=4)
    plain = new_learner(micro_tokens=micro_tokens)
    trusting = new_learner(micro_tokens=micro_tokens, trust_engine_logprobs=True)
    batch = fresh(plain, groups)
    read = count_passes(trusting, monkeypatch)
    theirs, mine = plain.learn_from(batch).metrics, trusting.learn_from(batch).metrics
    assert sum(read) == wanted
    for name in ("loss/policy", "kl/ref", "grad/norm", "value/loss"):
        assert mine[name] == pytest.approx(theirs[name], abs=1e-5), name
    assert mine["mismatch/lag0_abs_mean"] < 1e-6 and mine["offpolicy/tokens/lag0"] > 0
    stale = trusting.learn_from(batch).metrics
    assert "mismatch/lag0_abs_mean" not in stale, "no token is of the present version"
    assert stale["offpolicy/tokens/lag1"] == int(batch.mask_BT.sum()), "and all are computed"


def test_an_engine_that_is_off_is_not_trusted(new_learner, make_groups, caplog):
    groups = make_groups(seed=1, groups=8, samples=4)
    plain, trusting = new_learner(), new_learner(trust_engine_logprobs=True)
    batch = fresh(plain, groups)
    off = dataclasses.replace(batch, behaviour_BT=batch.behaviour_BT - 0.01 * batch.mask_BT)
    theirs, mine = plain.learn_from(off).metrics, trusting.learn_from(off).metrics
    assert mine["loss/policy"] == pytest.approx(theirs["loss/policy"], abs=1e-6)
    assert mine["mismatch/lag0_abs_mean"] == pytest.approx(0.01, rel=1e-2)
    assert "computed anew" in caplog.text


@pytest.mark.parametrize(
    ("opened", "micro_tokens"),
    [
        pytest.param(0, 2048, id="the first minibatch is of an older policy"),
        pytest.param(1, 2048, id="all of it but one sequence"),
        pytest.param(0, 16, id="so is every sixteenth sequence"),
    ],
)
def test_trust_is_checked_wherever_the_trusted_are(
    new_learner, make_groups, caplog, opened, micro_tokens
):
    learner = new_learner(trust_engine_logprobs=True, minibatches=8, micro_tokens=micro_tokens)
    learner.version = 1
    batch = fresh(learner, make_groups(seed=1, groups=8, samples=4))
    first = next(minibatches(len(batch), learner.config, (3, 0)))
    versions = torch.ones_like(batch.versions_BT)
    versions[first[opened:]] = 0
    versions[::16] = 0
    off = batch.behaviour_BT - 0.5 * batch.mask_BT
    metrics = learner.learn_from(
        dataclasses.replace(batch, versions_BT=versions, behaviour_BT=off)
    ).metrics
    assert "computed anew" in caplog.text
    assert metrics["mismatch/lag0_abs_mean"] == pytest.approx(0.5, rel=1e-3)


# -- how long a step goes on -------------------------------------------------------------


def test_a_step_ends_early_when_the_policy_has_gone_far_enough(new_learner, make_groups):
    far = new_learner(epochs=6, lr=1e-2, objective={"target_kl": 1e-4})
    near = new_learner(epochs=6, lr=1e-2)
    assert near.learn(make_groups(seed=1)).metrics["learn/optimizer_steps"] == 12
    stopped = far.learn(make_groups(seed=1)).metrics
    assert 1 <= stopped["learn/optimizer_steps"] < 12
    left = [p.grad for part in far.networks.trained for p in part.parameters()]
    assert left == [None] * len(left), "nothing of the last minibatch reaches the next step"


def test_a_step_sets_out_from_where_it_began_and_not_from_who_sampled(new_learner, make_groups):
    """Samples of a policy far away do not end a step that has not moved."""
    learner = new_learner(
        lr=1e-12,
        epochs=4,
        objective={"target_kl": 1e-3},
        off_policy={"anchor": "behaviour", "weight": "none"},
    )
    batch = to_experience(RolloutBatch(groups=tuple(make_groups(seed=1))))
    metrics = learner.learn_from(
        dataclasses.replace(batch, behaviour_BT=batch.behaviour_BT * 3)
    ).metrics
    assert metrics["ppo/ess"] < 0.9
    assert metrics["ppo/approx_kl"] < 1e-6 and metrics["learn/optimizer_steps"] == 8


def test_the_critic_warms_up_alone(new_learner, make_groups):
    learner = new_learner(value={"warmup_steps": 2})
    before, critic = policy_of(learner), [p.detach().clone() for p in learner.critic.parameters()]
    for seed in (1, 2):
        report = learner.learn(make_groups(seed=seed))
        assert not report.skipped and report.metrics["loss/policy"] == 0
    assert not moved(learner, before) and learner.version == 2
    assert any(
        not torch.equal(a, b) for a, b in zip(critic, learner.critic.parameters(), strict=True)
    )
    learner.learn(make_groups(seed=3))
    assert moved(learner, before)


def test_the_penalty_moves_only_where_it_has_a_target(new_learner, make_groups):
    free = new_learner(objective={"kind": "kl_penalty", "penalty": 2.0})
    held = new_learner(objective={"kind": "kl_penalty", "penalty": 2.0, "penalty_target": 1e3})
    for learner, wanted in ((free, [2.0, 2.0]), (held, [2.0, 1.0])):
        prices = [learner.learn(make_groups(seed=s)).metrics["ppo/penalty"] for s in (1, 2)]
        assert prices == wanted


def test_a_dearer_penalty_is_another_step(new_learner, make_groups):
    """From the second minibatch on, when there is a way back to be paid for."""
    made = []
    for price in (1.0, 1e3):
        learner = new_learner(objective={"kind": "kl_penalty", "penalty": price})
        learner.learn(make_groups(seed=1))
        made.append(learner)
    assert moved(made[0], policy_of(made[1]))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_penaltys_price_follows_where_the_step_ended(new_learner, make_groups, threads):
    """One update of one minibatch sets out from no distance at all: its end is what counts."""
    objective = {"kind": "kl_penalty", "penalty": 2.0, "penalty_target": 1e-9}
    learner = new_learner(
        lr=1e-3, epochs=1, minibatches=1, objective=objective, micro_tokens=40, threads=threads
    )
    batch = to_experience(RolloutBatch(groups=tuple(make_groups(seed=1))))
    before, _, _ = response_logprobs(learner.networks.policy, batch, 1.0, with_entropy=False)
    report = learner.learn_from(batch)
    after, _, _ = response_logprobs(learner.networks.policy, batch, 1.0, with_entropy=False)
    gap = (before - after)[batch.mask_BT]
    assert report.metrics["ppo/moved"] == pytest.approx(
        (-gap).expm1().add(gap).mean().item(), rel=1e-3
    )
    assert report.metrics["ppo/moved"] > 1e-8 and learner.penalty.coef == 4.0


def test_the_penalty_rests_while_the_critic_warms_up(new_learner, make_groups):
    objective = {"kind": "kl_penalty", "penalty": 2.0, "penalty_target": 1e-9}
    learner = new_learner(objective=objective, value={"warmup_steps": 1})
    learner.learn(make_groups(seed=1))
    assert learner.penalty.coef == 2.0
    learner.learn(make_groups(seed=2))
    assert learner.penalty.coef == 4.0


def test_what_goes_by_plan_begins_when_the_policy_does(new_learner, make_groups):
    """Its rate rises from its own first step, a price of KL that is linear moves from there, and
    one that follows the KL does not fall while there is none."""
    own = {"value": {"warmup_steps": 2}, "warmup_steps": 2, "lr": 1e-3, "total_steps": 6}
    by_plan = new_learner(schedule="linear", kl={"kind": "linear", "coef": 0.2}, **own)
    seen = [by_plan.learn(make_groups(seed=s)).metrics for s in range(6)]
    rates, prices = ([m[name] for m in seen] for name in ("learn/lr", "kl/coef"))
    assert rates == pytest.approx([0, 0, 1e-4, 1e-3, 1e-3, 0.5e-3])
    assert prices == pytest.approx([0.2, 0.2, 0.2, 0.15, 0.1, 0.05]) and by_plan.kl.coef == 0
    (policy,), (critic,) = (optimizer.param_groups for optimizer in by_plan.optimizers)
    assert policy["lr"] == pytest.approx(0.5e-3)
    assert critic["lr"] == pytest.approx(1e-3 * (1 - 3 / 4)), "which has learned all along"

    following = new_learner(kl={"kind": "adaptive", "coef": 0.2, "horizon": 20}, **own)
    prices = [following.learn(make_groups(seed=s)).metrics["kl/coef"] for s in range(4)]
    assert prices[:3] == [0.2] * 3 and prices[3] < 0.2


@pytest.mark.parametrize("weight", ["token", "none"])
def test_the_effective_sample_size_is_that_of_the_samples_not_of_what_is_cut(
    new_learner, make_groups, weight
):
    """A cap of 1 makes all large weights equal: the samples are as far off as before."""
    learner = new_learner(off_policy={"weight": weight, "cap": 1.0})
    batch = to_experience(RolloutBatch(groups=tuple(make_groups(seed=1))))
    far = dataclasses.replace(batch, behaviour_BT=batch.behaviour_BT * 3)
    logprobs, _, _ = response_logprobs(learner.networks.policy, far, 1.0, with_entropy=False)
    ratios = (logprobs - far.behaviour_BT)[far.mask_BT].detach().double().clamp(max=20).exp()
    wanted = ratios.sum() ** 2 / (len(ratios) * (ratios**2).sum())
    assert wanted < 0.9
    assert learner.learn_from(far).metrics["ppo/ess"] == pytest.approx(wanted.item(), rel=1e-3)


# -- PPO-ptx, the average, the optimizer ---------------------------------------------------


def test_the_pretraining_gradient_is_that_of_the_mean_token(tiny_policy):
    policy = load_policy(tiny_policy)
    networks = Networks(policy=PolicyModel(policy), reference=None, critic=None)
    rng = np.random.default_rng(0)
    examples = [torch.tensor(rng.integers(3, 300, n)) for n in (9, 2, 5, 30)]
    policy.zero_grad()
    for budget in (30, 4096):
        policy.zero_grad()
        loss = pretrain_backward(networks, examples, 27.8, budget)
        mine = [p.grad for p in policy.parameters()]
        policy.zero_grad(set_to_none=True)
        terms = [
            nn.functional.cross_entropy(
                policy(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="sum"
            )
            for ids in examples
        ]
        slow = torch.stack(terms).sum() / sum(len(ids) - 1 for ids in examples)
        (27.8 * slow).backward()
        assert loss == pytest.approx(slow.item(), rel=1e-5)
        for grad, parameter in zip(mine, policy.parameters(), strict=True):
            torch.testing.assert_close(grad, parameter.grad, atol=1e-4, rtol=1e-4)


def test_ptx_adds_its_gradient_to_the_objectives(new_learner, make_groups, tmp_path):
    path = tmp_path / "pretrain.safetensors"
    save_examples([[5, 6, 7, 8], [9], [10, 11, 12]], path)
    examples = Examples.load(path)
    assert [e.tolist() for e in examples.ids] == [[5, 6, 7, 8], [10, 11, 12]]
    assert [e.tolist()[0] for e in examples.turn(1, 3)] == [10, 5, 10], "in order, and round"
    settings = {"coef": 2.0, "sequences": 2}
    mixed, plain = new_learner(path, pretrain=settings), new_learner()
    first = mixed.learn(make_groups(seed=1)).metrics
    assert first["loss/pretrain"] == pytest.approx(math.log(300), abs=0.4)
    assert "loss/pretrain" not in plain.learn(make_groups(seed=1)).metrics
    later = new_learner(path, pretrain=settings, value={"warmup_steps": 1})
    told = ["loss/pretrain" in later.learn(make_groups(seed=seed)).metrics for seed in (1, 2)]
    assert told == [False, True], "none is read while the critic learns alone"
    last = [mixed.learn(make_groups(seed=seed)).metrics for seed in range(2, 12)][-1]
    assert last["loss/pretrain"] < first["loss/pretrain"] - 0.5, "two sentences are learnt soon"
    with pytest.raises(ValueError, match="no example of two tokens"):
        save_examples([[1]], path)


def test_ptx_takes_its_texts_in_turn_once_the_policy_learns(
    new_learner, make_groups, tmp_path, monkeypatch
):
    """Four optimizer steps a step; the critic has the first one to itself."""
    path = tmp_path / "pretrain.safetensors"
    save_examples([[5, 6, 7, 8], [10, 11, 12]], path)
    turn, turns = Examples.turn, []

    def noted(examples, number, count):
        turns.append(number)
        return turn(examples, number, count)

    monkeypatch.setattr(Examples, "turn", noted)
    learner = new_learner(
        path, epochs=2, minibatches=2, value={"warmup_steps": 1}, pretrain={"coef": 1.0}
    )
    for seed in (1, 2, 3):
        learner.learn(make_groups(seed=seed))
    assert turns == [4, 5, 6, 7, 8, 9, 10, 11]


def test_text_for_ptx_that_the_disk_does_not_take_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("distrl.learn.pretrain.save_file", full)
    path = tmp_path / "pretrain.safetensors"
    with pytest.raises(NotWritten, match=rf"learn\.pretrain .*{path}: No space left.*--resume"):
        save_examples([[5, 6, 7, 8]], path)


def test_the_average_is_that_of_the_paper_and_is_what_is_exported(
    new_learner, make_groups, tmp_path, vectors
):
    inputs, wanted = (vectors["ema_weights"][k] for k in ("inputs", "expected"))
    one = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        one.weight.fill_(inputs["ema0"])
    average = WeightAverage(one, inputs["decay"])
    seen = []
    for value in inputs["w"]:
        with torch.no_grad():
            one.weight.fill_(value)
        average.update()
        seen.append(average.weights["weight"].item())
    assert seen == pytest.approx(wanted["ema"])

    learner = new_learner(ema=0.5)
    start = policy_of(learner)[0]
    learner.learn(make_groups(seed=1))
    now = policy_of(learner)[0]
    learner.export(tmp_path / "policy")
    exported = next(iter(load_policy(tmp_path / "policy").parameters()))
    torch.testing.assert_close(exported.detach(), (start + now) / 2)
    assert torch.equal(policy_of(learner)[0], now), "the learner itself goes on where it was"


@pytest.mark.parametrize("where", ["torch", "tf"])
def test_epsilon_sits_where_it_is_said_to(where, vectors):
    """A constant gradient (Huang et al. 2024)."""
    inputs, expected = (vectors["adam_eps_placement"][k] for k in ("inputs", "expected"))
    wanted = expected[f"{where}_updates"]
    assert len(wanted) == inputs["steps"]
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    make = {"torch": torch.optim.AdamW, "tf": TFAdamW}[where]
    optimizer = make(
        [weight],
        lr=inputs["lr"],
        betas=tuple(inputs["betas"]),
        eps=inputs["eps"],
        weight_decay=0.0,
    )
    steps = []
    for _ in wanted:
        before = weight.item()
        weight.grad = torch.full_like(weight, inputs["grad_const"])
        optimizer.step()
        steps.append(weight.item() - before)
    assert steps == pytest.approx(wanted, rel=1e-9)


def test_tf_and_torch_agree_but_for_epsilon():
    made = {}
    for kind in (torch.optim.AdamW, TFAdamW):
        torch.manual_seed(0)
        module = nn.Linear(4, 3)
        optimizer = kind(module.parameters(), lr=0.01, eps=1e-14, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            module(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        made[kind] = module.weight.detach()
    torch.testing.assert_close(made[torch.optim.AdamW], made[TFAdamW])


# -- settings that cannot work ----------------------------------------------------------------


@pytest.mark.parametrize(
    "config, message",
    [
        ({"off_policy": {"anchor": "behaviour"}}, r"set learn\.off_policy\.weight=none"),
        *(
            (
                {"objective": {"kind": "policy_gradient"}, "off_policy": off_policy},
                r"takes no ratios.*set learn\.off_policy\.anchor=proximal, and .*weight=token",
            )
            for off_policy in ({"anchor": "behaviour"}, {"anchor": "behaviour", "weight": "none"})
        ),
        ({"objective": {"kind": "sequence"}}, r"set learn\.objective\.aggregate=sequence"),
        ({"value": {"trunk": "shared"}}, r"set learn\.value\.start=policy"),
        ({"off_policy": {"floor": 3.0}}, r"floor=3.0 is above off_policy\.cap=2.0"),
        ({"off_policy": {"reject": True, "weight": "none"}}, "weight=none weighs nothing"),
        ({"off_policy": {"reject": True, "cap": 0.5}}, "floor=0 and cap=0.5 leaves out every"),
        ({"off_policy": {"reject": True, "floor": 1.5}}, "floor=1.5 and cap=2 leaves out every"),
        ({"objective": {"kind": "ppo"}}, "choose one of clip, sequence"),
        ({"advantage": {"kind": "group", "baseline": "none"}}, r"set learn\.advantage\.scale=none"),
        (
            {"advantage": {"kind": "group", "whiten_rewards": True}},
            r"set learn\.advantage\.whiten_rewards=false",
        ),
        (
            {"advantage": {"kind": "returns", "whiten_rewards": True}},
            r"kind=returns adds them up.*set learn\.advantage\.whiten_rewards=false",
        ),
        ({"kl": {"kind": "adaptive", "coef": 0}}, r"learn\.kl\.coef=0 stays 0"),
        ({"adam_betas": (0.9, 1.0)}, r"adam_betas=\(0\.9, 1\.0\): each keeps a share"),
        ({"adam_betas": (-0.1, 0.9)}, "each keeps a share"),
    ],
)
def test_what_cannot_work_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        LearnConfig.model_validate(config)


@pytest.mark.parametrize("config", [{"lora": {"rank": 4}}, {"value": {"start": "reward_model"}}])
def test_what_is_said_of_a_critic_holds_where_there_is_one(config):
    shared = {"trunk": "shared", "start": "policy"} | config.pop("value", {})
    with pytest.raises(ValueError, match=r"learn\.value\."):
        LearnConfig.model_validate(config | {"value": shared})
    LearnConfig.model_validate(config | {"value": shared, "advantage": {"kind": "group"}})


@pytest.mark.parametrize(
    "kind, aggregate, bounds",
    [
        ("clip", "token", (0.2, 0.2)),
        ("sequence", "sequence", (3e-4, 4e-4)),
        ("capped_weight", "token", (1.0, 4.0)),
    ],
)
def test_an_objectives_bounds_are_its_papers_unless_they_are_set(kind, aggregate, bounds):
    plain = {"kind": kind, "aggregate": aggregate}
    for chosen, wanted in ((plain, bounds), (plain | {"clip_low": 0.5}, (0.5, bounds[1]))):
        found = LearnConfig.model_validate({"objective": chosen}).objective
        assert (found.clip_low, found.clip_high) == wanted


def test_the_learning_rate_falls_to_its_floor(new_learner, make_groups):
    learner = new_learner(
        schedule="cosine", schedule_floor=0.3, warmup_steps=0, lr=1e-3, total_steps=2
    )
    rates = [learner.learn(make_groups(seed=s)).metrics["learn/lr"] for s in (1, 2, 3)]
    assert rates == pytest.approx([1e-3, 0.65e-3, 0.3e-3])
