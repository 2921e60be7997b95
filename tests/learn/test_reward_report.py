"""Agreement with people: pairs, margins, calibration, intervals."""

from __future__ import annotations

import numpy as np
import pytest

from distrl.data.errors import DataError
from distrl.learn import reward_report
from distrl.learn.reward_report import agreement, draw_pairs, plot_agreement, resampled_weights


def world(n=400, noise=0.0, seed=0):
    """Ratings, and raw scores that are right but for noise."""
    rng = np.random.default_rng(seed)
    ratings_N = rng.uniform(-4, 4, n).astype(np.float32)
    return (ratings_N + noise * rng.normal(size=n)).astype(np.float32), ratings_N, [""] * n


def test_pairs_are_within_a_prompt_and_of_unequal_ratings():
    ratings_N = np.array([1, 1, 2, 5, 6, 7], np.float32)
    pairs = draw_pairs(ratings_N, ["a", "a", "a", "b", "b", "c"], 0)
    assert sorted(map(sorted, pairs.tolist())) == [[0, 2], [1, 2], [3, 4]]
    rounded = np.array([0.3, 0.3 + 3e-8, 0], np.float32)
    assert rounded[0] != rounded[1], "and yet they are equal"
    pairs = draw_pairs(rounded, ["a"] * 3, 0)
    assert sorted(map(sorted, pairs.tolist())) == [[0, 2], [1, 2]]
    with pytest.raises(DataError, match=r"rated differently \(4 .* 1 prompts.*data\.source"):
        draw_pairs(np.ones(4, np.float32), ["a"] * 4, 0)


def test_ratings_that_hold_within_a_row_are_compared_within_it_alone():
    """Rows AB, BC and AC to each prompt, better 1 and worse 0, and a model that is right."""
    raw = np.array([3, 2, 2, 1, 3, 1] * 50, np.float32)
    ratings_N = np.array([1, 0] * 150, np.float32)
    prompts, sets = [str(i // 6) for i in range(300)], [i // 2 for i in range(300)]
    accuracy = agreement(raw, ratings_N, prompts, 0, sets).accuracy["0"]
    assert (accuracy.value, accuracy.pairs) == (1, 150)


def test_intervals_resample_prompts_or_rows_where_there_is_one_prompt():
    """Each row is one pair, right in two of three; the three of a prompt are alike."""
    ratings_N = np.array([1, 0] * 300, np.float32)
    raw = np.where(np.arange(600) // 6 % 3 < 2, ratings_N, 1 - ratings_N).astype(np.float32)
    sets = [i // 2 for i in range(600)]
    for prompts, units in ([str(i // 6) for i in range(600)], 100), ([""] * 600, 300):
        found = agreement(raw, ratings_N, prompts, 0, sets).accuracy["0"]
        wide = 2 * 1.96 * (found.value * (1 - found.value) / units) ** 0.5
        assert found.pairs == 300 and found.high - found.low == pytest.approx(wide, rel=0.2)


def test_no_more_than_the_cap_is_drawn_and_either_order_occurs():
    _, ratings_N, prompts = world()
    pairs = draw_pairs(ratings_N, prompts, 0)
    assert len(pairs) == 20_000 and len(np.unique(np.sort(pairs, axis=1), axis=0)) == 20_000
    first_is_better = ratings_N[pairs[:, 0]] > ratings_N[pairs[:, 1]]
    assert first_is_better.mean() == pytest.approx(0.5, abs=0.02)
    assert (pairs == draw_pairs(ratings_N, prompts, 0)).all()


def test_a_perfect_order_is_1_a_reversed_one_0_and_a_constant_0():
    raw, ratings_N, prompts = world()
    assert agreement(raw, ratings_N, prompts, 0).accuracy["0"].value == 1
    assert agreement(-raw, ratings_N, prompts, 0).accuracy["0"].value == 0
    constant = agreement(np.zeros_like(raw), ratings_N, prompts, 0)
    assert constant.accuracy["0"].value == 0, "a tie is no agreement"


def test_wider_margins_are_easier_and_have_fewer_pairs():
    quality = agreement(*world(noise=2.0), 0)
    by_margin = [quality.accuracy[m] for m in ("0", "0.5", "1", "2")]
    assert [e.value for e in by_margin] == sorted(e.value for e in by_margin)
    assert [e.pairs for e in by_margin] == sorted((e.pairs for e in by_margin), reverse=True)
    assert all(e.low < e.value < e.high for e in by_margin)


def test_exactly_the_margin_apart_is_not_more_than_the_margin():
    """On a grid of 0.1: 1.2 and 0.7 would be more than 0.5 apart in 32 bits, 1.1 and 0.6 not."""
    ratings_N = np.tile(np.arange(-15, 16) / 10, 2).astype(np.float32)
    found = agreement(ratings_N, ratings_N, [""] * 62, 0).accuracy
    apart = np.abs(np.subtract.outer(np.arange(31), np.arange(31)))
    for margin, estimate in found.items():
        # Of each unordered pair of points the two rounds give four pairs.
        assert estimate.pairs == 4 * (apart > round(10 * float(margin))).sum() / 2


def test_margins_without_a_pair_are_left_out():
    raw, ratings_N, prompts = world()
    assert list(agreement(raw, np.float32(0.125) * ratings_N, prompts, 0).accuracy) == ["0", "0.5"]


def test_the_interval_covers_what_new_responses_would_give():
    truth = agreement(*world(n=4000, noise=3.0, seed=99), 0).accuracy["0"].value
    inside = 0
    for seed in range(10):
        estimate = agreement(*world(n=100, noise=3.0, seed=seed), 0).accuracy["0"]
        inside += estimate.low <= truth <= estimate.high
        # Pairs share responses: an interval that took them as independent would be +-0.01.
        assert estimate.high - estimate.low > 0.04
    assert inside >= 8


def test_calibration_is_of_the_difference_of_scores():
    rng = np.random.default_rng(0)
    raw = rng.normal(size=2000).astype(np.float32)
    # Ratings by Gumbel noise: P(i above j) is exactly sigmoid(raw_i - raw_j).
    ratings_N = (raw + rng.gumbel(size=2000)).astype(np.float32).astype(np.float32)
    honest = agreement(raw, ratings_N, [""] * 2000, 0)
    boastful = agreement(5 * raw, ratings_N, [""] * 2000, 0)
    assert honest.calibration_error.value < 0.03
    assert boastful.calibration_error.value > 0.15
    assert sum(pairs for _, _, pairs in honest.reliability) == 20_000


def test_prompts_are_resampled_whole_where_there_are_several():
    first, second = np.array([0, 0, 2]), np.array([1, 1, 3])
    weights = resampled_weights(first, second, 4, ["a", "a", "b", "b"], 0)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 0] + weights[:, 2] == 2).all()


def test_the_plot_is_a_picture(tmp_path):
    plot_agreement(agreement(*world(noise=2.0), 0), tmp_path / "deep" / "calibration.png")
    assert (tmp_path / "deep" / "calibration.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("right, lowest", [(1, 0.4), (0.2, 0.2), (0, 0)])
def test_the_plot_goes_down_to_the_lowest_accuracy(tmp_path, monkeypatch, right, lowest):
    figures = []
    monkeypatch.setattr(reward_report.plt, "close", figures.append)
    ratings_N = np.array([1, 0] * 100, np.float32)
    raw = np.where(np.arange(200) // 2 % 10 < 10 * right, ratings_N, 1 - ratings_N)
    quality = agreement(raw, ratings_N, [str(i // 2) for i in range(200)], 0)
    assert quality.accuracy["0"].value == pytest.approx(right)
    plot_agreement(quality, tmp_path / "calibration.png")
    low, high = figures[0].axes[0].get_ylim()
    assert high == 1 and low <= min(lowest, quality.accuracy["0"].low)
    assert low == 0.4 or lowest < 0.4


def test_with_every_pair_once_the_resampled_figures_are_the_figures_themselves(monkeypatch):
    ones = np.ones((3, 20_000), np.float32)
    monkeypatch.setattr(reward_report, "resampled_weights", lambda *_: ones)
    quality = agreement(*world(noise=2.0), 0)
    for estimate in (*quality.accuracy.values(), quality.calibration_error):
        assert estimate.low == pytest.approx(estimate.value, abs=1e-5)
        assert estimate.high == pytest.approx(estimate.value, abs=1e-5)
