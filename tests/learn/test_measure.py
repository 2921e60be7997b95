"""What is told of a batch, counted by hand: two responses, of 3 and 2 tokens, at version 4."""

from __future__ import annotations

import dataclasses
from math import log

import pytest
import torch

from distrl.config import LearnConfig
from distrl.learn.experience import Experience
from distrl.learn.measure import by_age, measure, part_means
from distrl.learn.prepare import Prepared
from distrl.records import Score

CONFIG = LearnConfig.model_validate(
    {"objective": {"clip_low": 0.4, "clip_high": 1.5}, "off_policy": {"floor": 0.75, "cap": 2.0}}
)
RATIOS = torch.tensor([[2.0, 1.0, 4.0], [0.5, 1.0, 1.0]])


@pytest.fixture
def batch() -> Experience:
    """Its tokens are 2, 1 and 1, and 0 and 0 versions old."""
    return Experience(
        ids_BL=torch.ones(2, 4, dtype=torch.long),
        prompt_lengths_B=torch.tensor([1, 1]),
        response_lengths_B=torch.tensor([3, 2]),
        tokens_BT=torch.ones(2, 3, dtype=torch.long),
        behaviour_BT=torch.tensor([[-3.0, -2.0, -4.0], [-1.0, -2.0, 0.0]]),
        versions_BT=torch.tensor([[2, 3, 3], [4, 4, 0]]),
        scores_B=torch.zeros(2),
        samples_1=torch.tensor([1]),
    )


@pytest.fixture
def prepared(batch: Experience) -> Prepared:
    """The first token is masked as too old; the last one's log-probability is the engine's."""
    proximal = batch.behaviour_BT + RATIOS.log()
    return Prepared(
        kept=torch.tensor([[False, True, True], [True, True, False]]),
        computed=torch.tensor([[True, True, True], [True, False, False]]),
        proximal=proximal,
        entropy=torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 0.0]]),
        reference=proximal - torch.tensor([[0.5, -0.25, 0.25], [1.0, 0.0, 0.0]]),
        old=proximal,
        values=torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]]),
        advantages=torch.zeros(2, 3),
        returns=torch.tensor([[2.0, 2.0, 4.0], [4.0, 8.0, 0.0]]),
        weights=torch.tensor([[2.0, 1.0, 2.0], [0.75, 1.0, 0.0]]),
    )


def test_what_a_batch_says(batch: Experience, prepared: Prepared) -> None:
    assert measure(batch, prepared, CONFIG, version=4) == pytest.approx(
        {
            "ppo/entropy": 10 / 4,  # of what was computed
            "ppo/ess": 8.5**2 / (5 * 22.25),
            "ppo/capped": 2 / 5,  # 4 to 2, and 0.5 to 0.75
            "staleness/max": 1,
            "staleness/mean": 2 / 4,
            "kl/ref": (0.5 + 1.0) / 2,
            "value/mean": 15 / 5,
            "value/explained_variance": 1 - 1.2 / 4.8,
            "mismatch/lag0_abs_mean": log(2),  # of the one fresh token that was computed
        }
    )


def test_what_nobody_asks_for_is_not_told(batch: Experience, prepared: Prepared) -> None:
    bare = {"kl": {"coef": 0.0, "watch": False}, "advantage": {"kind": "group"}}
    config = LearnConfig.model_validate(bare | {"off_policy": {"weight": "none"}})
    nothing = dataclasses.replace(prepared, kept=torch.zeros_like(prepared.kept))
    assert measure(batch, nothing, config, version=5) == pytest.approx(
        {
            "ppo/entropy": 10 / 4,
            "ppo/ess": 8.5**2 / (5 * 22.25),
            "staleness/max": 0,
            "staleness/mean": 0,
        }
    )


def test_the_effective_sample_size_is_of_what_is_weighed(
    batch: Experience, prepared: Prepared
) -> None:
    """By sequence the first three tokens weigh 2 * 1 * 4 each, and the other two 0.5."""
    config = LearnConfig.model_validate({"off_policy": {"weight": "sequence"}})
    found = measure(batch, prepared, config, version=4)["ppo/ess"]
    assert found == pytest.approx(25**2 / (5 * (3 * 64 + 2 * 0.25)))


def test_what_each_age_says(batch: Experience, prepared: Prepared) -> None:
    """Ratios of 0.5 at age 0, of 1 and 4 at age 1, of 2 at age 2; the bounds are 0.6 and 2.5."""
    names = ("tokens", "kl", "ess", "ratio_mean", "clip_fraction")
    by_hand = {
        0: (1, 0.5 - 1 + log(2), 1, 0.5, 1),
        1: (2, (4 - 1 - log(4)) / 2, 25 / 34, 2.5, 0.5),
        2: (1, 2 - 1 - log(2), 1, 2, 0),
    }
    wanted = {
        f"offpolicy/{name}/lag{age}": number
        for age, numbers in by_hand.items()
        for name, number in zip(names, numbers, strict=True)
    }
    assert by_age(batch, prepared, CONFIG, version=4) == pytest.approx(wanted)


def test_each_part_of_the_reward_has_its_mean(make_groups) -> None:
    parts = iter([1.0, 2.0, 6.0, 3.0])
    groups = [
        dataclasses.replace(
            group,
            scores=tuple(Score(value=9.0, parts={"liked": next(parts)}) for _ in group.scores),
        )
        for group in make_groups(seed=1, groups=2, samples=2)
    ]
    assert part_means(groups) == {"reward/liked": 3.0}
