from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrl.algo import AdaptiveKL, FixedKL, LinearKL, kl_estimate, shape_rewards


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_estimators_known_answers(vectors, close, kind):
    entry = vectors["kl_estimators"]
    log_ratio = torch.tensor(entry["inputs"]["logr"])
    close(kl_estimate(torch.zeros(4), log_ratio, kind), entry["expected"][kind])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("mu", ["0.1", "1.0"])
def test_bias_and_deviation_between_gaussians(vectors, kind, mu):
    """Means over a fine grid of quantiles of N(0, 1), so that nothing is left to chance."""
    wanted = vectors["kl_estimators"]["expected"]["gaussian_q_N01_p_Nmu1"][mu]
    x = torch.special.ndtri((torch.arange(400_000) + 0.5) / 400_000)
    estimate = kl_estimate(-0.5 * x**2, -0.5 * (x - float(mu)) ** 2, kind)
    kl = wanted["true_kl"]
    assert estimate.mean() / kl - 1 == pytest.approx(wanted[f"{kind}_bias_over_kl"], abs=2e-3)
    assert estimate.std() / kl == pytest.approx(wanted[f"{kind}_std_over_kl"], rel=5e-3)


@given(logprob=st.floats(-50, 0), reference=st.floats(-50, 0))
def test_k2_and_k3_are_never_negative_and_never_overflow(logprob, reference):
    pair = torch.tensor([logprob]), torch.tensor([reference])
    for kind in ("k2", "k3"):
        estimate = kl_estimate(*pair, kind)
        assert estimate >= 0 and estimate.isfinite().all()


def test_gradient_of_k3_is_finite_for_any_gap():
    logprobs = torch.tensor([-1e4, 0.0], dtype=torch.float32, requires_grad=True)
    kl_estimate(logprobs, logprobs.detach().flip(0), "k3").sum().backward()
    assert logprobs.grad is not None and logprobs.grad.isfinite().all()


def test_estimator_refusals():
    with pytest.raises(ValueError, match="k1, k2, k3; got 'k4'"):
        kl_estimate(torch.zeros(2), torch.zeros(2), "k4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        kl_estimate(torch.zeros(2), torch.zeros(3))


def test_shaped_rewards_known_answers(vectors, close):
    inputs, wanted = (vectors["kl_shaped_reward"][k] for k in ("inputs", "expected"))
    mask = torch.arange(4) < torch.tensor(inputs["length"])[:, None]
    rewards = shape_rewards(
        torch.tensor(inputs["score"]),
        torch.tensor(inputs["logprob"]),
        torch.tensor(inputs["ref_logprob"]),
        mask,
        inputs["beta"],
    )
    close(rewards, wanted["rewards"])
    close(rewards.sum(1), wanted["rlhf_reward_per_sequence"])


@pytest.mark.parametrize("garbage", [3.0, math.inf, math.nan])
def test_the_score_sits_on_the_last_masked_token(garbage, close):
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    logprobs = torch.where(mask.bool(), -1.0, garbage)
    rewards = shape_rewards(torch.tensor([5.0, 7.0, 9.0]), logprobs, logprobs, mask, 0.1)
    close(rewards, [[0.0, 0, 0, 5, 0], [7.0, 0, 0, 0, 0], [0.0, 0, 0, 0, 0]])


def test_a_failed_score_stays_visible_and_in_its_own_sequence():
    rewards = shape_rewards(
        torch.tensor([math.nan, 1.0]), torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2, 2), 0.1
    )
    assert rewards.isnan().tolist() == [[False, True], [False, False]]


def test_shaping_refuses_scores_of_another_batch():
    tokens = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"scores_B \(3,\) and logprobs_BT \(2, 3\)"):
        shape_rewards(torch.zeros(3), tokens, tokens, tokens, 0.1)


def test_adaptive_known_answers(vectors, close):
    inputs, wanted = (vectors["adaptive_kl_ziegler"][k] for k in ("inputs", "expected"))
    controller = AdaptiveKL(inputs["beta0"], inputs["target"], inputs["horizon"])
    for kl, beta in zip(inputs["kl_sequence"], wanted["beta_sequence"], strict=True):
        close(controller.update(torch.tensor(kl), inputs["n_steps"]), beta)
        close(controller.coef, beta)


@given(kl=st.floats(-100, 1e6), coef=st.floats(1e-3, 10), n=st.integers(0, 10_000))
def test_adaptive_moves_toward_the_target_and_at_most_a_fifth_a_horizon(kl, coef, n):
    moved = AdaptiveKL(coef, 6.0, 10_000).update(kl, n) - coef
    assert moved * (kl - 6.0) >= 0
    assert abs(moved) <= coef * 0.2 * n / 10_000 * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_adaptive_refuses_what_would_poison_it(kl):
    controller = AdaptiveKL(0.1)
    with pytest.raises(ValueError, match="finite"):
        controller.update(kl, 10)
    with pytest.raises(ValueError, match="raise the horizon"):
        controller.update(0.0, 50_000)
    assert controller.coef == 0.1


def test_coefficients_are_checked():
    for build in (lambda: AdaptiveKL(-0.1), lambda: FixedKL(-0.1), lambda: FixedKL(math.nan)):
        with pytest.raises(ValueError, match="coef"):
            build()
    for target, horizon in ((0.0, 1), (0.5, 0)):
        with pytest.raises(ValueError, match="positive"):
            AdaptiveKL(0.1, target, horizon)
    assert AdaptiveKL(0.1, 0.5, 1).update(5.0, 1) == pytest.approx(0.12)
    for start, end, samples, message in ((-1, 0, 1, "start"), (0, -1, 1, "end"), (0, 0, 0, "sam")):
        with pytest.raises(ValueError, match=message):
            LinearKL(start, end, samples)


def test_fixed_stays():
    controller = FixedKL(0.02)
    assert controller.update(99.0, 512) == controller.coef == 0.02
