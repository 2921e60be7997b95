from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrl.algo import ppo_clip_loss


def row(values):
    return torch.tensor([values])


def slow_token(ratio, advantage, low, high, dual):
    """One token's objective and its derivative by the ratio, case by case."""
    objective, slope = ratio * advantage, advantage
    if advantage > 0 and ratio > 1 + high:
        objective, slope = (1 + high) * advantage, 0.0
    if advantage < 0 and ratio < 1 - low:
        objective, slope = (1 - low) * advantage, 0.0
    if dual is not None and advantage < 0 and objective < dual * advantage:
        objective, slope = dual * advantage, 0.0
    return objective, slope


def test_known_answers(vectors, close):
    inputs, wanted = (vectors["ppo_clip"][k] for k in ("inputs", "expected"))
    # Log and exp may land an ulp outside the bounds: a clip a hair wider keeps 0.8 and 1.2 inside.
    ratio = row(inputs["ratio"]).requires_grad_()
    advantage, eps = row(inputs["advantage"]), inputs["eps"] + 1e-12
    zeros, ones = torch.zeros_like(advantage), torch.ones_like(advantage)
    result = ppo_clip_loss(ratio.log(), zeros, advantage, ones, eps, eps)
    close(result.loss, wanted["loss"])
    close(result.clip_fraction, wanted["clipfrac_binding"])
    close(result.ratio_mean, sum(inputs["ratio"]) / len(inputs["ratio"]))
    (gradient,) = torch.autograd.grad(-result.loss * ratio.numel(), ratio)
    close(gradient[0], wanted["dobjective_dratio_elementwise"])
    for n, objective in enumerate(wanted["per_element"]):
        one = ppo_clip_loss(
            ratio[:, n : n + 1].log(), zeros[:, :1], advantage[:, n : n + 1], ones[:, :1], eps, eps
        )
        close(-one.loss, objective)


def test_the_terms_of_a_total_loss(vectors, close):
    inputs, wanted = (vectors["ppo_total_loss"][k] for k in ("inputs", "expected"))
    new, old, advantage = (row(inputs[k]) for k in ("logprob_new", "logprob_old", "advantage"))
    result = ppo_clip_loss(new, old, advantage, torch.ones(1, 3), inputs["eps"], inputs["eps"])
    close(result.loss, -wanted["lclip"])
    close(result.approx_kl, wanted["approxkl_k3"])
    close(result.ratio_mean, sum(wanted["ratio"]) / 3)


def test_decoupled_objective(vectors, close):
    inputs, wanted = (vectors["stale_ratio"][k] for k in ("inputs", "expected"))
    new, prox, behaviour, advantage = (
        row(inputs[k]) for k in ("lp_new", "lp_prox", "lp_behaviour", "advantage")
    )
    weights, ones = (prox - behaviour).exp(), torch.ones(1, 3)
    close(
        ppo_clip_loss(new, prox, advantage, ones, weights_BT=weights).loss,
        -sum(wanted["decoupled"]) / 3,
    )
    close(ppo_clip_loss(new, behaviour, advantage, ones).loss, -sum(wanted["clip_behaviour"]) / 3)


@pytest.mark.parametrize(
    ("low", "high", "dual"), [(0.2, 0.2, None), (0.1, 0.3, None), (0.2, 0.28, 3.0), (0.0, 0.0, 1.5)]
)
def test_loss_and_gradient_against_a_loop(low, high, dual, close):
    generator = torch.Generator().manual_seed(0)
    new, old, advantage = torch.randn(3, 6, 9, generator=generator)
    weights = torch.rand(6, 9, generator=generator) * 2
    mask = torch.rand(6, 9, generator=generator) < 0.7
    new.requires_grad_()
    result = ppo_clip_loss(new, old, advantage, mask, low, high, dual, weights)
    result.loss.backward()

    total, bound, gradient, count = 0.0, 0, torch.zeros(6, 9), int(mask.sum())
    for b in range(6):
        for t in range(9):
            if mask[b, t]:
                ratio, a = math.exp((new - old)[b, t].item()), advantage[b, t].item()
                objective, slope = slow_token(ratio, a, low, high, dual)
                total += weights[b, t].item() * objective
                bound += slope == 0
                gradient[b, t] = -weights[b, t] * slope * ratio / count
    close(result.loss, -total / count)
    close(result.clip_fraction, bound / count)
    close(new.grad, gradient)


@given(
    log_ratio=st.floats(-3, 3),
    advantage=st.floats(-5, 5),
    dual=st.sampled_from([None, 1.5, 3.0]),
)
def test_clipping_only_ever_lowers_the_objective_but_for_the_dual(log_ratio, advantage, dual):
    new, old = row([log_ratio]).double(), torch.zeros(1, 1, dtype=torch.float64)
    objective = -ppo_clip_loss(
        new, old, row([advantage]).double(), torch.ones(1, 1), dual_clip=dual
    ).loss
    plain = math.exp(log_ratio) * advantage
    if dual is None or advantage >= 0:
        assert objective <= plain + 1e-9
    else:
        assert objective >= dual * advantage - 1e-9


def test_at_the_old_policy_it_is_the_policy_gradient(close):
    generator = torch.Generator().manual_seed(1)
    logprobs, advantage = torch.randn(2, 4, 5, generator=generator)
    logprobs.requires_grad_()
    result = ppo_clip_loss(logprobs, logprobs, advantage, torch.ones(4, 5))
    result.loss.backward()
    close(logprobs.grad, -advantage / 20)
    assert result.clip_fraction == 0 and result.approx_kl == 0 and result.ratio_mean == 1


def test_only_the_new_logprobs_get_a_gradient():
    tensors = [torch.randn(2, 3, requires_grad=True) for _ in range(4)]
    new, old, advantage, weights = tensors
    result = ppo_clip_loss(new, old, advantage, torch.ones(2, 3), weights_BT=weights)
    result.loss.backward()
    assert new.grad is not None
    assert old.grad is None and advantage.grad is None and weights.grad is None
    metrics = result.clip_fraction, result.approx_kl, result.ratio_mean
    assert not any(metric.requires_grad for metric in metrics)


@pytest.mark.parametrize("garbage", [50.0, math.inf, -math.inf, math.nan])
def test_padding_reaches_neither_result_nor_gradient(garbage):
    def run(padding: float):
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        generator = torch.Generator().manual_seed(2)
        new, old, advantage, weights = (
            torch.where(mask.bool(), torch.randn(2, 3, generator=generator), padding)
            for _ in range(4)
        )
        result = ppo_clip_loss(new.requires_grad_(), old, advantage, mask, 0.2, 0.2, 3.0, weights)
        result.loss.backward()
        return result.loss, result.clip_fraction, result.approx_kl, result.ratio_mean, new.grad

    for clean, dirty in zip(run(0.0), run(garbage), strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


@pytest.mark.parametrize("gap", [1e3, -1e3])
@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
def test_ratios_never_overflow(gap, advantage):
    new = torch.full((1, 2), gap, dtype=torch.float32, requires_grad=True)
    old, scores = torch.zeros(1, 2), torch.full((1, 2), advantage)
    result = ppo_clip_loss(new, old.float(), scores.float(), torch.ones(1, 2))
    result.loss.backward()
    for tensor in (result.loss, result.approx_kl, result.ratio_mean, new.grad):
        assert tensor is not None and tensor.isfinite().all()


def test_no_tokens_give_zero():
    new = torch.randn(2, 3, requires_grad=True)
    result = ppo_clip_loss(new, new, new, torch.zeros(2, 3))
    result.loss.backward()
    assert result.loss == result.clip_fraction == result.approx_kl == result.ratio_mean == 0
    assert new.grad is not None and (new.grad == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_low": -0.1}, "clip_low"),
        ({"clip_high": math.nan}, "clip_high"),
        ({"dual_clip": 1.0}, "dual_clip must exceed 1"),
        ({"weights_BT": torch.ones(2, 1)}, r"weights_BT \(2, 1\) and logprobs_BT \(2, 3\)"),
        ({"mask_BT": torch.ones(3, 3)}, r"mask_BT \(3, 3\) and logprobs_BT \(2, 3\)"),
    ],
)
def test_refusals(options, message):
    names = ("logprobs_BT", "old_logprobs_BT", "advantages_BT", "mask_BT")
    with pytest.raises(ValueError, match=message):
        ppo_clip_loss(**{**{name: torch.ones(2, 3) for name in names}, **options})
