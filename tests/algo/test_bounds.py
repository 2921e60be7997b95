from __future__ import annotations

import math

import pytest
import torch

from distrl.algo import largest_gain


def test_no_tilted_policy_beats_the_bound_and_the_best_ones_reach_it(vectors):
    """π_η ∝ π_0 exp(η r) has the largest gain for its KL (sqrt_kl_law)."""
    entry = vectors["sqrt_kl_law"]
    p0 = torch.tensor(entry["inputs"]["p0"])
    reward = torch.tensor(entry["inputs"]["reward"])
    seen = reward.repeat_interleave((p0 * 1000).round().long())  # as many of each as p0 says
    for row in entry["expected"]["rows"]:
        eta = row["eta"]
        tilted = torch.softmax(p0.log() + eta * reward, 0)
        kl = (tilted * (tilted / p0).log()).sum().item()
        gain = ((tilted - p0) * reward).sum().item()
        assert kl == pytest.approx(row["kl"], rel=1e-6, abs=1e-12)
        assert gain == pytest.approx(row["gain"])
        assert largest_gain(kl, seen, (eta,)) == pytest.approx(gain), (
            "the bound is tight at its eta"
        )
        assert largest_gain(kl, seen) >= gain - 1e-9


def test_any_policy_is_within_the_bound():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        p0, p = torch.rand(2, 6, generator=generator).softmax(1)
        reward = 3 * torch.randn(6, generator=generator)
        counts = torch.round(p0 * 10_000).long()
        p0 = counts / counts.sum()
        kl = (p * (p / p0).log()).sum().item()
        gain = ((p - p0) * reward).sum().item()
        assert gain <= largest_gain(kl, reward.repeat_interleave(counts)) + 1e-9


def test_without_a_step_there_is_hardly_a_gain():
    rewards = torch.randn(100, generator=torch.Generator().manual_seed(1))
    assert 0 <= largest_gain(0.0, rewards) < 0.01
    with pytest.raises(ValueError, match="kl must lie"):
        largest_gain(-1.0, rewards)
    with pytest.raises(ValueError, match="rewards of the reference"):
        largest_gain(1.0, rewards[:0])
    assert math.isfinite(largest_gain(4.6, 1e6 * rewards))
    assert largest_gain(4.7, rewards) == math.inf, "100 samples resolve log 100 = 4.6 nats"
