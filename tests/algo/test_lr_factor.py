from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrl.algo import lr_factor


def test_known_answers(vectors):
    inputs, wanted = (vectors["lr_schedules"][k] for k in ("inputs", "expected"))
    total, warmup = inputs["T"], inputs["W"]
    cosine = [lr_factor(step, total, "cosine") for step in range(total + 1)]
    assert cosine == pytest.approx(wanted["cosine_to_10pct"], rel=1e-12)
    linear = [lr_factor(step, total, "linear") for step in range(total + 1)]
    assert linear == pytest.approx(wanted["linear"], rel=1e-12)
    ramp = wanted["warmup_10_from_tenth"]
    factors = [lr_factor(step, 100, "constant", warmup) for step in range(len(ramp))]
    assert factors == pytest.approx(ramp, rel=1e-12)


@given(
    total=st.integers(1, 60),
    warmup=st.integers(0, 60),
    kind=st.sampled_from(["constant", "linear", "cosine"]),
    floor=st.floats(0, 1),
)
def test_it_climbs_to_the_peak_then_never_climbs_again(total, warmup, kind, floor):
    warmup = min(warmup, total)
    factors = [lr_factor(step, total, kind, warmup, floor) for step in range(total + 5)]
    peak = max(warmup - 1, 0)
    assert factors[peak] == 1
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert min(factors) >= min(floor if kind == "cosine" else 0, 0.1) - 1e-12
    assert len(set(factors[total:])) == 1


def test_after_the_warm_up_the_fall_takes_the_steps_that_are_left():
    """3 of 11 steps warm up, so step 7 is half way down the other 8."""
    assert lr_factor(7, 11, "linear", 3) == 0.5
    assert lr_factor(7, 11, "cosine", 3, 0.2) == pytest.approx(0.2 + 0.8 / 2)


@pytest.mark.parametrize(
    ("step", "total", "options", "message"),
    [
        (0, 10, {"kind": "step"}, "constant, linear, cosine; got 'step'"),
        (-1, 10, {}, "step"),
        (0, 0, {}, "total"),
        (0, 10, {"warmup": 11}, "warmup"),
        (0, 10, {"floor": 1.5}, "floor"),
    ],
)
def test_refusals(step, total, options, message):
    with pytest.raises(ValueError, match=message):
        lr_factor(step, total, **options)
