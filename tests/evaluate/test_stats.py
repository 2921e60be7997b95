from __future__ import annotations

import math

import numpy as np
import pytest

from distrl.evaluate import distinct_n, stats

OPTIONS: dict[str, int] = {"resamples": 1000, "seed": 0}


def excludes_0(interval: stats.Interval) -> bool:
    return not interval.low <= 0.0 <= interval.high


def test_the_interval_of_a_mean_is_the_textbooks():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=(400, 1))
    interval = stats.mean(values, **OPTIONS)
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)


def test_intervals_hold_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(2)
    hits = sum(
        not excludes_0(stats.mean(rng.normal(size=(60, 1)), resamples=200, seed=k))
        for k in range(200)
    )
    assert 178 <= hits <= 198


def test_samples_of_one_prompt_are_not_taken_for_independent():
    per_prompt = np.random.default_rng(3).normal(size=(50, 1))
    one = stats.mean(per_prompt, **OPTIONS)
    copies = stats.mean(per_prompt.repeat(16, axis=1), **OPTIONS)
    assert (copies.low, copies.high) == pytest.approx((one.low, one.high))


def test_pairing_takes_the_prompts_difficulty_out():
    rng = np.random.default_rng(4)
    before = rng.normal(0, 10, size=(100, 1))
    after = before + 0.5 + rng.normal(0, 0.1, size=(100, 1))
    change = stats.difference(before, after, **OPTIONS)
    assert excludes_0(change) and change.high - change.low < 0.1
    same = stats.difference(np.array([[0.0], [5.0]]), np.array([[1.0], [6.0]]), **OPTIONS)
    assert same == stats.Interval(value=1.0, low=1.0, high=1.0), "each prompt gained 1"
    with pytest.raises(ValueError, match="not the same prompts"):
        stats.difference(before, after[:-1], **OPTIONS)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(5).normal(size=(20, 2))
    assert stats.mean(values, **OPTIONS) == stats.mean(values, **OPTIONS)


def test_the_gain_is_in_deviations_of_the_policy_before():
    rng = np.random.default_rng(6)
    before = rng.normal(5, 2, size=(500, 2))
    after = rng.normal(8, 7, size=(500, 2))
    gain = stats.standardised_gain(before, after, **OPTIONS)
    assert gain.value == pytest.approx((after.mean() - before.mean()) / before.std())
    assert gain.low < gain.value < gain.high and excludes_0(gain)
    with pytest.raises(ValueError, match="all equal"):
        stats.standardised_gain(np.full((4, 1), 0.1), after[:4], **OPTIONS)


def test_win_rate_counts_ties_half():
    before = np.array([[0.0], [1.0], [2.0], [3.0]])
    after = np.array([[1.0], [1.0], [1.0], [9.0]])
    assert stats.win_rate(before, after, **OPTIONS).value == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_win_rate_compares_every_pair_of_samples_of_a_prompt():
    before, after = np.array([[0.0, 2.0]]), np.array([[1.0, 3.0]])
    assert stats.win_rate(before, after, **OPTIONS).value == 0.75


def test_distinct_n():
    assert distinct_n(["a good film", "a bad film"], 1) == pytest.approx(4 / 6)
    assert distinct_n(["a good film", "A good plot"], 2) == pytest.approx(3 / 4)
    assert distinct_n(["one", ""], 2) == 0.0
