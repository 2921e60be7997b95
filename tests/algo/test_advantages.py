from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrl.algo import explained_variance, gae, group_advantages

CASES = [
    "truncated_bootstrap",
    "terminal",
    "gamma1_lam095",
    "lam0_td_residual",
    "lam1_eq10",
]


def slow_gae(rewards, values, bootstrap, gamma, lam):
    """The double sum, straight from the definition: Σ_l (γλ)^l δ_{t+l}."""
    T = len(rewards)
    after = [*values[1:], bootstrap]
    delta = [rewards[t] + gamma * after[t] - values[t] for t in range(T)]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, T)) for t in range(T)]


def random_batch(seed, B=4, T=6):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, T + 1, (B,), generator=generator)
    mask = torch.arange(T).expand(B, T) < lengths[:, None]
    rewards, values = torch.randn(2, B, T, generator=generator, dtype=torch.float64)
    bootstrap = torch.randn(B, generator=generator, dtype=torch.float64)
    return rewards, values, mask, bootstrap, lengths


@pytest.mark.parametrize("case", CASES)
def test_gae_known_answers(vectors, close, case):
    entry = vectors["gae_truncated"]
    wanted = entry["expected"][case]
    rewards, values = (torch.tensor([entry["inputs"][k]]) for k in ("rewards", "values"))
    bootstrap = torch.tensor([wanted["last_value"]])
    advantages, returns = gae(
        rewards, values, torch.ones(1, 4), wanted["gamma"], wanted["lam"], bootstrap
    )
    close(advantages[0], wanted["advantages"])
    close(returns[0], wanted["returns"])


def test_gae_of_an_episode_that_ends_inside_is_that_of_two_sequences(vectors, close):
    entry = vectors["gae_truncated"]
    wanted = entry["expected"]["done_inside"]
    rewards, values = (
        torch.tensor(entry["inputs"][k]).reshape(2, 2) for k in ("rewards", "values")
    )
    bootstrap = torch.tensor([0.0, wanted["last_value"]])
    advantages, returns = gae(
        rewards, values, torch.ones(2, 2), wanted["gamma"], wanted["lam"], bootstrap
    )
    close(advantages.flatten(), wanted["advantages"])
    close(returns.flatten(), wanted["returns"])


@given(seed=st.integers(0, 2**31), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_gae_against_the_double_sum(seed, gamma, lam):
    rewards, values, mask, bootstrap, lengths = random_batch(seed)
    advantages, returns = gae(rewards, values, mask, gamma, lam, bootstrap)
    for b, n in enumerate(lengths.tolist()):
        wanted = slow_gae(
            rewards[b, :n].tolist(), values[b, :n].tolist(), bootstrap[b].item(), gamma, lam
        )
        wanted = torch.tensor([*wanted, *[0.0] * (6 - n)], dtype=torch.float64)
        torch.testing.assert_close(advantages[b], wanted)
        torch.testing.assert_close(
            returns[b], torch.where(mask[b], wanted + values[b], 0), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("garbage", [7.0, math.inf, math.nan])
def test_gae_never_sees_padding_or_holes(garbage, close):
    rewards, values = torch.tensor([1.0, 0.0, 2.0, -1.0]), torch.tensor([0.5, 1.0, 1.5, 0.25])
    dense, dense_returns = gae(rewards[None], values[None], torch.ones(1, 4), 0.9, 0.8)
    places = torch.tensor([0, 1, 4, 5])  # two holes and two of padding
    spread_rewards, spread_values = torch.full((2, 1, 8), garbage)
    spread_rewards[0, places], spread_values[0, places] = rewards, values
    mask = torch.zeros(1, 8).index_fill(1, places, 1)
    advantages, returns = gae(spread_rewards, spread_values, mask, 0.9, 0.8)
    close(advantages[0, places], dense[0])
    close(returns[0, places], dense_returns[0])
    assert (advantages[mask == 0] == 0).all() and (returns[mask == 0] == 0).all()


def test_gae_carries_no_gradient_and_no_tokens_give_zeros():
    values = torch.randn(2, 3, requires_grad=True)
    advantages, returns = gae(torch.randn(2, 3), values, torch.zeros(2, 3), 1.0, 0.95)
    assert not advantages.requires_grad and not returns.requires_grad
    assert (advantages == 0).all() and (returns == 0).all()


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3), (2, 4), (2, 3)), {}, r"values_BT \(2, 4\) and rewards_BT \(2, 3\)"),
        (((2, 3), (2, 3), (3,)), {}, r"mask_BT needs the 2 axes BT, got \(3,\)"),
        (((2, 3),) * 3, {"bootstrap_B": torch.zeros(3)}, r"bootstrap_B \(3,\) and values_BT"),
        (((2, 3),) * 3, {"gamma": 1.1}, "gamma"),
        (((2, 3),) * 3, {"lam": -0.1}, "lam"),
    ],
)
def test_gae_refusals(shapes, options, message):
    rewards, values, mask = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        gae(rewards, values, mask, **{"gamma": 1.0, "lam": 1.0, **options})


def test_leave_one_out_known_answers(vectors, close):
    entry = vectors["rloo_baseline"]
    rewards = torch.tensor([entry["inputs"]["rewards"]])
    advantages = group_advantages(rewards, "leave_one_out", "none")
    close(advantages[0], entry["expected"]["advantages"])


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "none"])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_group_advantages_against_loops(baseline, scale, close):
    rewards = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 4 + 1
    advantages = group_advantages(rewards, baseline, scale)
    for g, group in enumerate(rewards.tolist()):
        mean = sum(group) / 5
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 5 + 1e-8) if scale == "std" else 1
        for n, r in enumerate(group):
            others = [x for m, x in enumerate(group) if m != n]
            expected = {"mean": mean, "leave_one_out": sum(others) / 4, "none": 0}[baseline]
            close(advantages[g, n], (r - expected) / std)


@given(reward=st.floats(-1e4, 1e4, width=32), n=st.integers(2, 9))
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equal_rewards_give_exact_zeros_in_float32(baseline, reward, n):
    rewards = torch.full((1, n), reward, dtype=torch.float32)
    assert (group_advantages(rewards, baseline, "std") == 0).all()


@given(
    rewards=st.lists(st.floats(-10, 10), min_size=2, max_size=8),
    shift=st.floats(-10, 10),
)
def test_a_baseline_removes_any_constant_and_the_mean(rewards, shift):
    group = torch.tensor([rewards], dtype=torch.float64)
    advantages = group_advantages(group, "mean", "none")
    torch.testing.assert_close(group_advantages(group + shift, "mean", "none"), advantages)
    assert abs(advantages.sum()) < 1e-9


def test_a_group_of_one_has_its_reward_or_nothing_to_be_held_against(close):
    rewards = torch.tensor([[3.0], [-5.0]])
    close(group_advantages(rewards, "none", "none"), [[3.0], [-5.0]])
    close(group_advantages(rewards, "mean", "std"), [[0.0], [0.0]])


def test_group_advantages_refusals():
    with pytest.raises(ValueError, match="mean, leave_one_out, none; got 'median'"):
        group_advantages(torch.zeros(2, 3), "median")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="std, none; got 'var'"):
        group_advantages(torch.zeros(2, 3), scale="var")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"\(2, 1\): sample more answers"):
        group_advantages(torch.zeros(2, 1), "leave_one_out")
    with pytest.raises(ValueError, match=r"rewards_GN needs the 2 axes GN, got \(3,\)"):
        group_advantages(torch.zeros(3))


def test_explained_variance(close):
    returns, mask = torch.tensor([[1.0, 2.0, 4.0, math.nan]]), torch.tensor([[1, 1, 1, 0]])
    values = torch.tensor([[1.0, 2.5, 3.5, math.inf]])
    kept, residual = returns[0, :3], (returns - values)[0, :3]
    wanted = 1 - residual.var(correction=0) / kept.var(correction=0)
    close(explained_variance(values, returns, mask), wanted)
    close(explained_variance(returns, returns, mask), 1.0)
    close(explained_variance(returns + 3, returns, mask), 1.0)
    close(explained_variance(torch.zeros(1, 4), returns, mask), 0.0)


@pytest.mark.parametrize("constant", [0.1, -3e3])
def test_explained_variance_of_nothing_to_explain_is_zero(constant):
    values, returns = torch.randn(1, 7).float(), torch.full((1, 7), constant).float()
    assert explained_variance(values, returns, torch.ones(1, 7)) == 0
    assert explained_variance(values, values, torch.zeros(1, 7)) == 0


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_explained_variance_has_no_unit(size):
    returns = size * torch.tensor([[1.0, 2.0, 4.0]]).float()
    assert explained_variance(returns, returns, torch.ones(1, 3)) == 1
