from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrl.algo import (
    expected_calibration_error,
    normalisation,
    pairwise_loss,
    ranking_loss,
)


def slow_ranking(scores, ranks, margin):
    losses = [
        math.log1p(math.exp(-(scores[i] - scores[j] - margin[i][j])))
        for i in range(len(scores))
        for j in range(len(scores))
        if ranks[i] < ranks[j]
    ]
    return sum(losses) / len(losses) if losses else 0.0


def test_pairwise_known_answers(vectors, close):
    inputs, wanted = (vectors["rm_pairwise"][k] for k in ("inputs", "expected"))
    chosen, rejected = (torch.tensor(inputs[k]).requires_grad_() for k in ("r_w", "r_l"))
    loss = pairwise_loss(chosen, rejected)
    loss.backward()
    close(loss, wanted["loss"])
    close(chosen.grad, wanted["grad_r_w"])
    close(rejected.grad, wanted["grad_r_l"])
    for w, lost, one in zip(inputs["r_w"], inputs["r_l"], wanted["per_pair"], strict=True):
        close(pairwise_loss(torch.tensor([w]), torch.tensor([lost])), one)


def test_pairwise_margin_is_a_lead_to_be_made_good(close):
    chosen, rejected, margin = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    close(pairwise_loss(chosen, rejected, margin), pairwise_loss(chosen - margin, rejected))
    close(pairwise_loss(chosen, rejected, 0.5), pairwise_loss(chosen, rejected + 0.5))


def test_ranking_known_answers(vectors, close):
    inputs, wanted = (vectors["rm_ranking_K"][k] for k in ("inputs", "expected"))
    scores = torch.tensor(inputs["rewards_best_to_worst"], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([1, 2, 3, 4]))
    loss.backward()
    close(loss, wanted["loss"])
    close(scores.grad, wanted["grad"])
    tied = ranking_loss(scores, torch.tensor([1, 2, 2, 3]))
    close(tied, wanted["with_tie_ranks_1223"]["loss"])


@given(
    answers=st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 4)), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
)
def test_ranking_against_a_loop_in_any_order(answers, seed):
    scores, ranks = zip(*answers, strict=True)
    generator = torch.Generator().manual_seed(seed)
    K = len(scores)
    margin = torch.rand(K, K, generator=generator, dtype=torch.float64)
    scores_K, ranks_K = torch.tensor(scores, dtype=torch.float64), torch.tensor(ranks)
    loss = ranking_loss(scores_K, ranks_K, margin)
    assert loss.item() == pytest.approx(slow_ranking(scores, ranks, margin.tolist()))
    order = torch.randperm(K, generator=generator)
    shuffled = ranking_loss(scores_K[order], ranks_K[order], margin[order][:, order])
    torch.testing.assert_close(shuffled, loss)


def test_two_answers_are_a_pair(close):
    scores = torch.tensor([0.3, -0.4])
    close(ranking_loss(scores, torch.tensor([1, 2])), pairwise_loss(scores[:1], scores[1:]))
    close(
        ranking_loss(scores, torch.tensor([1, 2]), 0.25),
        pairwise_loss(scores[:1], scores[1:], 0.25),
    )


@pytest.mark.parametrize("shift", [-3.0, 10.0])
def test_only_differences_of_scores_matter(shift, close):
    scores, ranks = torch.tensor([2.0, 0.1, -1.0]), torch.tensor([2, 1, 3])
    close(ranking_loss(scores + shift, ranks), ranking_loss(scores, ranks))


def test_without_a_pair_the_loss_is_zero_and_keeps_the_graph():
    scores = torch.randn(3, requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([1, 1, 1])) + pairwise_loss(scores[:0], scores[:0])
    loss.backward()
    assert loss == 0 and scores.grad is not None and (scores.grad == 0).all()


def test_wild_scores_stay_finite():
    scores = torch.tensor([-1e4, 1e4], dtype=torch.float32, requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([1, 2]))
    loss.backward()
    assert loss == 2e4 and scores.grad is not None
    assert scores.grad.tolist() == [-1.0, 1.0]


def test_loss_refusals():
    with pytest.raises(ValueError, match=r"rejected_B \(3,\) and chosen_B \(2,\)"):
        pairwise_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"margin \(1,\) must be shaped like lead \(2,\)"):
        pairwise_loss(torch.zeros(2), torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match=r"ranks_K \(3,\) and scores_K \(2,\)"):
        ranking_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"margin \(2,\)"):
        ranking_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2))


def test_normalisation_known_answers(vectors, close):
    inputs, wanted = (vectors["rm_normalisation"][k] for k in ("inputs", "expected"))
    raw = torch.tensor(inputs["raw_on_reference_samples"])
    gain, bias = normalisation(raw, inputs["new_mean"], inputs["new_std"])
    close(gain, wanted["gain"])
    close(bias, wanted["bias"])
    close(gain * raw + bias, wanted["normalised"])


@given(raw=st.lists(st.floats(-100, 100), min_size=2, max_size=20), mean=st.floats(-5, 5))
def test_normalisation_does_what_it_says(raw, mean):
    scores = torch.tensor(raw, dtype=torch.float64)
    if scores.std(correction=0) < 1e-3:
        return
    gain, bias = normalisation(scores, mean, 2.0)
    placed = gain * scores + bias
    assert placed.mean().item() == pytest.approx(mean, abs=1e-6)
    assert placed.std(correction=0).item() == pytest.approx(2.0)


@pytest.mark.parametrize("raw", [[], [0.1, 0.1, 0.1], [1.0, math.nan], [1.0, math.inf]])
def test_normalisation_refuses_what_has_no_scale(raw):
    with pytest.raises(ValueError, match="score more reference samples"):
        normalisation(torch.tensor(raw))
    with pytest.raises(ValueError, match="std must be positive"):
        normalisation(torch.tensor([1.0, 2.0]), std=0.0)


def test_calibration_known_answers(vectors, close):
    inputs, wanted = (vectors["calibration_ece"][k] for k in ("inputs", "expected"))
    error = expected_calibration_error(
        torch.tensor(inputs["prob"]), torch.tensor(inputs["label"]), inputs["bins"]
    )
    close(error, wanted["ece"])


def test_calibration_at_its_ends(close):
    label = torch.tensor([0, 1, 1, 0])
    close(expected_calibration_error(label.double(), label, 7), 0.0)
    close(expected_calibration_error(1.0 - label, label, 7), 1.0)
    close(expected_calibration_error(torch.full((4,), 0.5), label, 7), 0.0)
    assert expected_calibration_error(torch.zeros(0), torch.zeros(0)) == 0


def test_calibration_refusals():
    with pytest.raises(ValueError, match=r"label \(2,\)"):
        expected_calibration_error(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="bins"):
        expected_calibration_error(torch.zeros(3), torch.zeros(3), 0)
    with pytest.raises(ValueError, match=r"prob must lie in \[0, 1\]"):
        expected_calibration_error(torch.tensor([math.nan]), torch.zeros(1))
