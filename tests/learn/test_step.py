"""One learner step against the formulas, written out slowly for single sequences."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator

import numpy as np
import pytest
import torch

from distrl.config import LearnConfig
from distrl.learn.experience import to_experience
from distrl.learn.forward import PolicyModel
from distrl.learn.networks import Networks
from distrl.learn.objectives import surrogate
from distrl.learn.prepare import prepare
from distrl.learn.update import Prices, Update, minibatches
from distrl.models import ScalarModel, load_policy
from distrl.records import RolloutBatch

TEMPERATURE, KL_COEF, LONGEST = 0.8, 0.3, 12
PRICES = Prices()


def learn(**settings):
    return LearnConfig.model_validate(settings)


def shake(module, seed, std=0.02):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(std * torch.randn(weight.shape, generator=generator))
    return module


@pytest.fixture
def models(tiny_policy):
    """A policy, its reference some way off, and a critic that has an opinion."""
    policy = shake(load_policy(tiny_policy), seed=1, std=0.1)
    reference = shake(load_policy(tiny_policy), seed=1, std=0.1)
    critic = ScalarModel.from_policy(policy, seed=3)
    return policy, shake(reference, seed=2), critic


@pytest.fixture
def batch(make_groups, models):
    """Log-probabilities of the sampler are near the policy's: some weights are capped."""
    batch = to_experience(RolloutBatch(groups=tuple(make_groups(seed=4, groups=3, samples=2))))
    prepared = prepared_for(batch, models, LearnConfig())
    noise = 0.6 * torch.randn(batch.mask_BT.shape, generator=torch.Generator().manual_seed(5))
    return dataclasses.replace(batch, behaviour_BT=prepared.proximal + noise * batch.mask_BT)


def prepared_for(batch, models, config):
    return prepare(batch, networks(models), config, temperature=TEMPERATURE, kl_coef=KL_COEF)


def networks(models):
    policy, reference, critic = models
    return Networks(policy=PolicyModel(policy), reference=PolicyModel(reference), critic=critic)


def run_backward(batch, prepared, models, config, index=None, prices=PRICES):
    """The report, and the gradients of policy and critic."""
    policy, _, critic = models
    policy.zero_grad()
    critic.zero_grad()
    index = torch.arange(len(batch)) if index is None else index
    update = Update(
        networks=networks(models), config=config, temperature=TEMPERATURE, longest=LONGEST
    )
    report = update.backward(batch, prepared, index, prices)
    return report, [p.grad.clone() for m in (policy, critic) for p in m.parameters()]


# -- the same again, slowly ---------------------------------------------------------


def slow_logprobs(model, prompt, answer):
    """Of one sequence without padding: log-probabilities and entropies, with gradient."""
    ids = torch.cat([prompt, answer])[None]
    logprobs = torch.log_softmax(model(input_ids=ids).logits[0] / TEMPERATURE, -1)
    rows = [logprobs[len(prompt) - 1 + t] for t in range(len(answer))]
    chosen = [row[token] for row, token in zip(rows, answer, strict=True)]
    return chosen, [-(row.exp() * row).sum() for row in rows]


def slow_values(critic, prompt, answer):
    whole = torch.cat([prompt, answer])[None]
    values = critic.values(whole, torch.tensor([whole.shape[1]]))[0]
    return [values[len(prompt) - 1 + t] for t in range(len(answer))]


def slow_sequences(batch):
    """(row, prompt ids, answer ids) of each sequence."""
    for row in range(len(batch)):
        p, t = int(batch.prompt_lengths_B[row]), int(batch.response_lengths_B[row])
        yield row, batch.ids_BL[row, :p], batch.ids_BL[row, p : p + t]


@torch.no_grad()
def slow_prepare(batch, models, config):
    """A dict of lists, one list a sequence, one number a token."""
    policy, reference, critic = models
    made = {name: [] for name in ("proximal", "reference", "values", "advantages", "returns")}
    made["weights"] = []
    for row, prompt, answer in slow_sequences(batch):
        logp = [x.item() for x in slow_logprobs(policy, prompt, answer)[0]]
        ref = [x.item() for x in slow_logprobs(reference, prompt, answer)[0]]
        values = [x.item() for x in slow_values(critic, prompt, answer)]
        n = len(answer)
        rewards = [-KL_COEF * (logp[t] - ref[t]) for t in range(n)]
        rewards[-1] += batch.scores_B[row].item()
        after = [*values[1:], 0.0]
        delta = [rewards[t] + config.advantage.gamma * after[t] - values[t] for t in range(n)]
        decay = config.advantage.gamma * config.advantage.lam
        advantages = [sum(decay ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
        behaviour = batch.behaviour_BT[row].tolist()
        made["proximal"].append(logp)
        made["reference"].append(ref)
        made["values"].append(values)
        made["advantages"].append(advantages)
        made["returns"].append([advantages[t] + values[t] for t in range(n)])
        made["weights"].append(
            [min(math.exp(logp[t] - behaviour[t]), config.off_policy.cap) for t in range(n)]
        )
    everything = np.concatenate(made["advantages"])
    scale = math.sqrt(everything.var() + 1e-8)
    made["advantages"] = [[(a - everything.mean()) / scale for a in s] for s in made["advantages"]]
    return made


def slow_losses(batch, models, config, known):
    """Policy loss with its entropy bonus, value loss; token means, with gradient."""
    policy, _, critic = models
    surrogate, entropies, errors, clipped = [], [], [], 0
    for row, prompt, answer in slow_sequences(batch):
        logp, entropy = slow_logprobs(policy, prompt, answer)
        values = slow_values(critic, prompt, answer)
        for t in range(len(answer)):
            a, w = known["advantages"][row][t], known["weights"][row][t]
            ratio = (logp[t] - known["proximal"][row][t]).exp()
            bounded = ratio.clamp(1 - config.objective.clip_low, 1 + config.objective.clip_high)
            clipped += int((bounded * a < ratio * a).item())
            surrogate.append(-w * torch.minimum(ratio * a, bounded * a))
            old, target = known["values"][row][t], known["returns"][row][t]
            near = values[t].clamp(old - config.value.clip, old + config.value.clip)
            errors.append(0.5 * torch.maximum((values[t] - target) ** 2, (near - target) ** 2))
            entropies.append(entropy[t])
    mean = lambda xs: torch.stack(xs).mean()  # noqa: E731
    policy_loss = mean(surrogate)
    bonus = config.objective.entropy_bonus * mean(entropies)
    return policy_loss, bonus, mean(errors), clipped / len(surrogate)


# -- the tests ----------------------------------------------------------------------


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5)])
def test_what_is_prepared_equals_the_formulas(models, batch, gamma, lam):
    config = learn(advantage={"gamma": gamma, "lam": lam}, micro_tokens=40)
    prepared = prepared_for(batch, models, config)
    for name, rows in slow_prepare(batch, models, config).items():
        tensor = getattr(prepared, name)
        for row, expected in enumerate(rows):
            got = tensor[row, : len(expected)]
            assert got.tolist() == pytest.approx(expected, abs=2e-4, rel=1e-4), name
            assert not tensor[row, len(expected) :].any(), f"{name} is 0 on padding"
    capped = (prepared.weights == config.off_policy.cap).sum()
    assert 0 < capped < batch.mask_BT.sum()


def test_losses_and_gradients_equal_the_formulas(models, batch):
    config = learn(objective={"entropy_bonus": 0.05}, micro_tokens=40)
    prepared = prepared_for(batch, models, config)
    known = slow_prepare(batch, models, config)
    policy, _, critic = models
    shake(policy, seed=7)  # away from where it was prepared
    shake(critic, seed=8)
    report, grads = run_backward(batch, prepared, models, config)
    policy.zero_grad()
    critic.zero_grad()
    policy_loss, bonus, value_loss, clipped = slow_losses(batch, models, config, known)
    (policy_loss - bonus + value_loss).backward()
    expected = [p.grad for m in (policy, critic) for p in m.parameters()]
    assert report.policy_loss == pytest.approx((policy_loss - bonus).item(), abs=1e-4)
    assert report.value_loss == pytest.approx(value_loss.item(), rel=1e-4)
    assert report.clip_fraction == pytest.approx(clipped) and 0 < clipped < 1
    assert 0 < report.value_clip_fraction < 1 and report.approx_kl > 0
    for mine, slow in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, slow, atol=1e-4, rtol=1e-3)


def test_kept_tokens_by_sequence_and_a_leash_in_the_loss_equal_the_formulas(models, batch):
    """The loss is a mean over sequences of their kept tokens' mean, and no weight is on the leash;
    what is told, and the critic's loss, are means over kept tokens."""
    config = learn(
        objective={"aggregate": "sequence"},
        kl={"place": "loss", "estimator": "k2"},
        micro_tokens=40,
    )
    kept = batch.mask_BT.clone()
    kept[:, 0] &= batch.response_lengths_B == 1
    prepared = prepared_for(batch, models, config)
    prepared = dataclasses.replace(prepared, kept=kept, old=prepared.proximal - 0.05 * kept)
    policy, _, critic = models
    shake(policy, seed=7)
    shake(critic, seed=8)
    report, grads = run_backward(batch, prepared, models, config, prices=Prices(kl=0.3))
    policy.zero_grad()
    critic.zero_grad()
    sequences, errors, clipped, value_clipped, moved = [], [], [], [], []
    for row, prompt, answer in slow_sequences(batch):
        logp, values = slow_logprobs(policy, prompt, answer)[0], slow_values(critic, prompt, answer)
        mine = []
        for t in kept[row].nonzero().flatten().tolist():
            known = {
                field.name: getattr(prepared, field.name)[row, t].item()
                for field in dataclasses.fields(prepared)
            }
            ratio, a = (logp[t] - known["old"]).exp(), known["advantages"]
            bounded = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
            clipped.append((bounded < ratio * a).item())
            leash = 0.3 * 0.5 * (known["reference"] - logp[t]) ** 2
            mine.append(-known["weights"] * bounded + leash)
            gap = logp[t].item() - known["proximal"]
            moved.append(math.expm1(gap) - gap)
            plain = (values[t] - known["returns"]) ** 2
            near = values[t].clamp(known["values"] - 0.2, known["values"] + 0.2)
            errors.append(0.5 * torch.maximum(plain, (near - known["returns"]) ** 2))
            value_clipped.append((errors[-1] > 0.5 * plain).item())
        sequences.append(torch.stack(mine).mean())
    policy_loss, value_loss = torch.stack(sequences).mean(), torch.stack(errors).mean()
    (policy_loss + value_loss).backward()
    for mine, slow in zip(
        grads, [p.grad for m in (policy, critic) for p in m.parameters()], strict=True
    ):
        torch.testing.assert_close(mine, slow, atol=1e-4, rtol=1e-3)
    assert report.policy_loss == pytest.approx(policy_loss.item(), abs=1e-4)
    assert report.value_loss == pytest.approx(value_loss.item(), rel=1e-4)
    assert report.clip_fraction == pytest.approx(np.mean(clipped))
    assert report.value_clip_fraction == pytest.approx(np.mean(value_clipped))
    assert report.approx_kl == pytest.approx(np.mean(moved), rel=1e-3)


def test_an_objective_is_told_which_tokens_count_and_what_a_nat_costs(models, batch, monkeypatch):
    """Those that are too old are no part of a sequence's mean ratio, say."""
    seen = []

    def noted(tokens, config):
        seen.append(tokens)
        return surrogate(tokens, config)

    monkeypatch.setattr("distrl.learn.update.surrogate", noted)
    prepared = prepared_for(batch, models, LearnConfig())
    kept = batch.mask_BT.clone()
    kept[:, 0] = False
    prepared = dataclasses.replace(prepared, kept=kept)
    run_backward(batch, prepared, models, LearnConfig(), prices=Prices(penalty=7.0))
    assert sum(int(tokens.mask.sum()) for tokens in seen) == kept.sum() > 0
    assert {tokens.penalty for tokens in seen} == {7.0}


@pytest.mark.parametrize("policy_learns", [True, False])
def test_a_critic_on_the_policys_body_adds_its_share_of_a_gradient(models, batch, policy_learns):
    policy = models[0]
    critic = ScalarModel.upon(policy)
    shake(critic.head, seed=3, std=0.5)
    config = learn(
        value={"trunk": "shared", "start": "policy", "coef": 0.25},
        kl={"coef": 0.0, "watch": False},
        micro_tokens=40,
    )
    both = Networks(policy=PolicyModel(policy), reference=None, critic=critic, shared=True)
    prepared = prepare(batch, both, config, temperature=TEMPERATURE, kl_coef=0.0)
    shake(policy, seed=7)
    update = Update(networks=both, config=config, temperature=TEMPERATURE, longest=LONGEST)
    index = torch.arange(len(batch))
    report = update.backward(batch, prepared, index, Prices(policy_learns=policy_learns))
    weights = [*policy.base_model.parameters(), *critic.head.parameters()]
    grads = [weight.grad.clone() for weight in weights]
    policy.zero_grad()
    critic.zero_grad()
    names = ("proximal", "values", "advantages", "returns", "weights")
    known = {name: getattr(prepared, name).tolist() for name in names}
    found = slow_losses(batch, (policy, None, critic), config, known)
    policy_loss, value_loss = found[0] * policy_learns, found[2]
    (policy_loss + 0.25 * value_loss).backward()
    for mine, weight in zip(grads, weights, strict=True):
        torch.testing.assert_close(mine, weight.grad, atol=1e-4, rtol=1e-3)
    assert report.policy_loss == pytest.approx(policy_loss.item(), abs=1e-4)
    assert report.value_loss == pytest.approx(value_loss.item(), rel=1e-4)
    assert report.clip_fraction == pytest.approx(found[3] * policy_learns)
    assert 0 < report.value_clip_fraction < 1


def test_gradients_do_not_depend_on_how_a_minibatch_is_cut(models, batch):
    made = []
    for micro_tokens in (20, 47, 4096):
        config = learn(objective={"entropy_bonus": 0.05}, micro_tokens=micro_tokens)
        made.append(run_backward(batch, prepared_for(batch, models, config), models, config))
    (report, grads), *others = made
    for other_report, other_grads in others:
        for mine, theirs in zip(grads, other_grads, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
        for name, value in dataclasses.asdict(report).items() - {("padding", report.padding)}:
            assert getattr(other_report, name) == pytest.approx(value, abs=1e-5)


def test_a_minibatchs_gradient_is_of_its_rows_alone(models, batch):
    config = LearnConfig()
    prepared = prepared_for(batch, models, config)
    index = torch.tensor([4, 1])
    report, grads = run_backward(batch, prepared, models, config, index)
    part = prepared.rows(index, int(batch.response_lengths_B[index].max()))
    told, alone = run_backward(batch.rows(index), part, models, config)
    assert dataclasses.asdict(report) == pytest.approx(dataclasses.asdict(told), abs=1e-5)
    read = batch.lengths_B[index]
    assert report.padding == pytest.approx(1 - int(read.sum()) / (2 * int(read.max())))
    for mine, theirs in zip(grads, alone, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_on_policy_the_first_ratio_is_one_and_so_are_the_weights(models, batch):
    config = LearnConfig()
    exact = prepared_for(batch, models, config).proximal
    fresh = dataclasses.replace(batch, behaviour_BT=exact)
    prepared = prepared_for(fresh, models, config)
    assert torch.equal(prepared.weights, fresh.mask_BT.float())
    report, _ = run_backward(fresh, prepared, models, config)
    assert report.clip_fraction == 0 and report.value_clip_fraction == 0
    assert report.approx_kl == pytest.approx(0, abs=1e-6)
    assert report.policy_loss == pytest.approx(0, abs=1e-5), "whitened advantages average to 0"


def test_rewards_and_advantages_are_whitened_as_asked(models, batch):
    plain = prepared_for(batch, models, learn(advantage={"whiten": False}))
    white = prepared_for(batch, models, LearnConfig())
    mask = batch.mask_BT
    assert white.advantages[mask].mean().abs() < 1e-5
    assert white.advantages[mask].var(correction=0).item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(plain.returns, plain.advantages + plain.values)
    torch.testing.assert_close(plain.returns, white.returns)
    assert plain.advantages[mask].mean().abs() > 1e-2
    rewards = prepared_for(batch, models, learn(advantage={"whiten_rewards": True}))
    assert not torch.allclose(rewards.returns, white.returns)


def test_minibatches_take_every_row_once_an_epoch_and_shuffle_by_the_seed_alone():
    config = LearnConfig(epochs=3, minibatches=4)
    parts = [part.tolist() for part in minibatches(12, config, (7, 1))]
    assert [len(part) for part in parts] == [3] * 12
    epochs = [functools.reduce(operator.iadd, parts[i : i + 4], []) for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert parts == [part.tolist() for part in minibatches(12, config, (7, 1))]
    assert parts != [part.tolist() for part in minibatches(12, config, (7, 2))]
    assert parts != [part.tolist() for part in minibatches(12, config, (8, 1))]
