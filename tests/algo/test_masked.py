from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrl.algo import masked_mean, masked_whiten
from distrl.algo.masked import masked_var


def test_known_answers(vectors, close):
    entry = vectors["whiten"]
    x, mask = torch.tensor(entry["inputs"]["x"]), torch.tensor(entry["inputs"]["mask"])
    expected = entry["expected"]
    close(masked_mean(x, mask), expected["masked_mean"])
    close(masked_var(x, mask), expected["masked_var"])
    close(masked_whiten(x, mask), expected["masked_shift_true"])
    close(masked_whiten(x, torch.ones_like(x)), expected["shift_mean_true"])
    close(masked_whiten(x, torch.ones_like(x), shift_mean=False), expected["shift_mean_false"])


def test_against_loops(close):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, generator=generator) * 3 + 2
    mask = torch.rand(5, 7, generator=generator) < 0.6
    kept = [x[b, t].item() for b in range(5) for t in range(7) if mask[b, t]]
    mean = sum(kept) / len(kept)
    var = sum((value - mean) ** 2 for value in kept) / len(kept)
    whitened = masked_whiten(x, mask)
    for b in range(5):
        for t in range(7):
            inside = (x[b, t].item() - mean) / math.sqrt(var + 1e-8)
            close(whitened[b, t], inside if mask[b, t] else 0.0)


@given(
    values=st.lists(st.floats(-100, 100), min_size=2, max_size=20),
    shift=st.floats(-100, 100),
    keep=st.booleans(),
)
def test_whitening_gives_mean_and_unit_variance(values, shift, keep):
    x = torch.tensor(values, dtype=torch.float64)
    mask = torch.ones_like(x)
    whitened = masked_whiten(x + shift, mask, shift_mean=not keep)
    mean = (x + shift).mean() if keep else torch.tensor(0.0)
    assert torch.isclose(whitened.mean(), mean, atol=1e-5)
    assert masked_var(whitened, mask) <= 1 + 1e-6
    if x.var(correction=0) > 1e-3:
        assert masked_var(whitened, mask) > 1 - 1e-4


@pytest.mark.parametrize("value", [7.3, 100.1, 1000.1])
def test_equal_numbers_differ_from_their_mean_by_nothing(value):
    """Divided by 1e-4, the rounding of their mean would be an advantage."""
    x, mask = torch.full((64, 100), value), torch.rand(64, 100) < 0.7
    assert not masked_whiten(x, mask).any()
    assert torch.equal(masked_whiten(x, mask, shift_mean=False), torch.where(mask, x, 0))


@pytest.mark.parametrize("garbage", [1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("function", [masked_mean, masked_var, masked_whiten])
def test_what_is_masked_reaches_neither_result_nor_gradient(function, garbage):
    def run(padding: float):
        x = torch.tensor([[1.0, 2.0, padding], [4.0, padding, padding]], requires_grad=True)
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        result = function(x, mask)
        (result * torch.arange(1.0, 1 + result.numel()).view_as(result)).sum().backward()
        return result, x.grad

    for clean, dirty in zip(run(0.0), run(garbage), strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


def test_a_mean_over_nothing_is_zero_and_stays_in_the_graph():
    x = torch.full((2, 3), math.nan, requires_grad=True)
    mean = masked_mean(x, torch.zeros(2, 3))
    mean.backward()
    assert mean == 0 and x.grad is not None and (x.grad == 0).all()
    assert torch.equal(masked_whiten(x, torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_any_kind_of_mask_and_the_dtype_of_x(dtype):
    x = torch.tensor([1.0, 2.0, 9.0], dtype=torch.float32)
    mean = masked_mean(x, torch.tensor([1, 1, 0]).to(dtype))
    assert mean == 1.5 and mean.dtype == torch.float32


def test_shapes_that_differ_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 1\)|\(2, 1\).*\(2, 3\)"):
        masked_mean(torch.zeros(2, 3), torch.zeros(2, 1))
