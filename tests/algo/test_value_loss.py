from __future__ import annotations

import math

import pytest
import torch

from distrl.algo import value_loss


def test_known_answers(vectors, close):
    inputs, wanted = (vectors["ppo_total_loss"][k] for k in ("inputs", "expected"))
    values, old, returns = (
        torch.tensor([inputs[k]]) for k in ("value_pred", "value_old", "value_target")
    )
    result = value_loss(values, old, returns, torch.ones(1, 3), clip=inputs["cliprange_value"])
    close(result.loss, wanted["vf_loss_half_max"])
    close(result.clip_fraction, wanted["vf_clipfrac"])
    plain = value_loss(values, old, returns, torch.ones(1, 3))
    close(plain.loss, 0.5 * wanted["vf_unclipped_mse"])
    assert plain.clip_fraction == 0


@pytest.mark.parametrize("clip", [None, 0.0, 0.3, 10.0])
def test_loss_and_gradient_against_a_loop(clip, close):
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 6, 9, generator=generator)
    mask = torch.rand(6, 9, generator=generator) < 0.7
    values.requires_grad_()
    result = value_loss(values, old, returns, mask, clip)
    result.loss.backward()

    total, bound, gradient, count = 0.0, 0, torch.zeros(6, 9), int(mask.sum())
    for b in range(6):
        for t in range(9):
            if mask[b, t]:
                v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
                near = v if clip is None else min(max(v, o - clip), o + clip)
                if (near - r) ** 2 > (v - r) ** 2:
                    total, bound = total + (near - r) ** 2, bound + 1
                else:
                    total, gradient[b, t] = total + (v - r) ** 2, (v - r) / count
    close(result.loss, 0.5 * total / count)
    close(result.clip_fraction, bound / count)
    close(values.grad, gradient)


def test_inside_the_clip_rounding_is_not_counted():
    """old + (new − old) is not new in floating point; a clamp to bounds is."""
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.rand(3, 50, 50, generator=generator)
    result = value_loss(values, old, returns, torch.ones(50, 50), clip=1.0)
    assert result.clip_fraction == 0


@pytest.mark.parametrize("garbage", [50.0, math.inf, math.nan])
def test_padding_reaches_neither_result_nor_gradient(garbage):
    def run(padding: float):
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        generator = torch.Generator().manual_seed(2)
        values, old, returns = (
            torch.where(mask.bool(), torch.randn(2, 3, generator=generator), padding)
            for _ in range(3)
        )
        result = value_loss(values.requires_grad_(), old, returns, mask, 0.2)
        result.loss.backward()
        return result.loss, result.clip_fraction, values.grad

    for clean, dirty in zip(run(0.0), run(garbage), strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


def test_only_the_values_get_a_gradient_and_no_tokens_give_zero():
    values, old, returns = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    value_loss(values, old, returns, torch.ones(2, 3), 0.1).loss.backward()
    assert values.grad is not None and old.grad is None and returns.grad is None
    empty = value_loss(values, old, returns, torch.zeros(2, 3), 0.1)
    assert empty.loss == 0 and empty.clip_fraction == 0


def test_refusals():
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match="clip"):
        value_loss(ones, ones, ones, ones, clip=-1.0)
    with pytest.raises(ValueError, match=r"returns_BT \(2, 1\) and values_BT \(2, 3\)"):
        value_loss(ones, ones, torch.ones(2, 1), ones)
