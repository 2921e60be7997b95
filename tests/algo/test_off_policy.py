from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrl.algo import effective_sample_size, importance_weights


def test_known_answers(vectors, close):
    inputs, wanted = (vectors["stale_ratio"][k] for k in ("inputs", "expected"))
    proximal, behaviour = (torch.tensor([inputs[k]]) for k in ("lp_prox", "lp_behaviour"))
    weights = importance_weights(proximal, behaviour, torch.ones(1, 3))
    close(weights[0], wanted["is_weight"])


@pytest.mark.parametrize("mode", ["token", "sequence"])
@pytest.mark.parametrize("reject", [False, True])
def test_against_a_loop(mode, reject, close):
    generator = torch.Generator().manual_seed(0)
    proximal, behaviour = torch.randn(2, 6, 4, generator=generator)
    mask = torch.rand(6, 4, generator=generator) < 0.7
    weights = importance_weights(proximal, behaviour, mask, mode, 1.5, reject)
    for b in range(6):
        ratios = [math.exp(proximal[b, t] - behaviour[b, t]) for t in range(4)]
        whole = math.prod(r for r, kept in zip(ratios, mask[b], strict=True) if kept)
        for t in range(4):
            ratio = ratios[t] if mode == "token" else whole
            capped = (0.0 if reject else 1.5) if ratio > 1.5 else ratio
            close(weights[b, t], capped if mask[b, t] else 0.0)


@pytest.mark.parametrize("mode", ["token", "sequence"])
@pytest.mark.parametrize("garbage", [9.0, math.inf, math.nan])
def test_padding_is_never_seen(mode, garbage):
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    proximal = torch.where(mask.bool(), -1.0, garbage).requires_grad_()
    behaviour = torch.where(mask.bool(), -1.2, garbage)
    weights = importance_weights(proximal, behaviour, mask, mode)
    assert not weights.requires_grad
    clean = importance_weights(torch.full((2, 3), -1.0), torch.full((2, 3), -1.2), mask, mode)
    assert torch.equal(weights, clean) and (weights[mask == 0] == 0).all()


@pytest.mark.parametrize(("reject", "wanted"), [(False, 2.0), (True, 0.0)])
def test_huge_ratios_do_not_overflow(reject, wanted):
    zeros = torch.zeros(1, 2, dtype=torch.float32)
    weights = importance_weights(zeros, zeros - 1e4, zeros + 1, "sequence", reject=reject)
    assert (weights == wanted).all()
    assert (importance_weights(zeros - 1e4, zeros, zeros + 1) == 0).all()
    assert importance_weights(zeros, zeros - 1e4, zeros + 1, cap=math.inf).isfinite().all()


def test_what_is_at_a_bound_is_not_rejected():
    zeros = torch.zeros(1, 2)
    assert (importance_weights(zeros, zeros, zeros + 1, cap=1.0, reject=True, floor=1.0) == 1).all()


def test_a_failed_logprob_stays_visible():
    ones = torch.ones(1, 2)
    assert importance_weights(torch.tensor([[math.nan, 0.0]]), ones, ones).isnan().any()


def test_refusals():
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match="token, sequence, geometric; got 'group'"):
        importance_weights(ones, ones, ones, "group")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="cap must be positive"):
        importance_weights(ones, ones, ones, cap=0.0)
    with pytest.raises(ValueError, match=r"behaviour_BT \(2, 4\) and proximal_BT \(2, 3\)"):
        importance_weights(ones, torch.ones(2, 4), ones)


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=20), scale=st.floats(0.01, 100))
def test_effective_sample_size_is_a_share_and_has_no_unit(weights, scale):
    weights_BT = torch.tensor([weights], dtype=torch.float64)
    share = effective_sample_size(weights_BT, torch.ones_like(weights_BT))
    n = len(weights)
    assert 1 / n - 1e-9 <= share <= 1
    assert share.item() == pytest.approx(sum(weights) ** 2 / n / sum(w * w for w in weights))
    scaled = effective_sample_size(weights_BT * scale, torch.ones_like(weights_BT))
    torch.testing.assert_close(scaled, share)


def test_effective_sample_size_at_its_ends(close):
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    close(effective_sample_size(torch.tensor([[2.0, 2, 2, 2, math.nan]]), mask), 1.0)
    close(effective_sample_size(torch.tensor([[2.0, 0, 0, 0, math.inf]]), mask), 0.25)
    assert effective_sample_size(torch.zeros(1, 5), mask) == 0
    assert effective_sample_size(torch.ones(1, 5), torch.zeros(1, 5)) == 0
