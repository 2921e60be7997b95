"""The weighted sum: its breakdown, its penalty, and no number where a part failed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distrl.config import ConfigError, OverlongConfig, RewardPart, ScoreConfig
from distrl.data.tokenizer import train_tokenizer
from distrl.records import Prompt, Rollout, Sample, ScoredRollout, VersionSpan
from distrl.roles import ScoreFailed
from distrl.score import RewardSum, with_default_part
from distrl.score.compose import OVERLONG, PENALTY, overlong_penalty


class Fixed:
    """Answers what it was made with."""

    def __init__(self, name, *answers):
        self.name, self.answers = name, list(answers)

    def scores(self, rollouts):
        return self.answers


def rollout(*finish_reasons) -> Rollout:
    ids = np.array([5, 1], np.int32)
    span = (VersionSpan(version=0, start=0, end=2),)
    samples = tuple(
        Sample(
            text="t", token_ids=ids, logprobs=np.zeros(2, np.float32), spans=span, finish_reason=f
        )
        for f in finish_reasons
    )
    prompt = Prompt(index=0, epoch=0, prompt_id="p", text="say", token_ids=ids)
    return Rollout(prompt=prompt, samples=samples, generator="g")


def test_the_sum_is_weighted_and_the_parts_are_kept_as_they_were():
    rewards = [Fixed("a", [1.0, 2.0]), Fixed("b", [10.0, 20.0])]
    (scored,) = RewardSum(rewards, {"a": 2.0, "b": -0.5}).score([rollout("stop", "length")])
    assert isinstance(scored, ScoredRollout)
    assert [s.value for s in scored.scores] == [-3.0, -6.0]
    assert dict(scored.scores[1].parts) == {"a": 2.0, "b": 20.0}


def test_the_penalty_is_added_where_length_cut_and_stands_among_the_parts():
    composed = RewardSum([Fixed("a", [1.0, 1.0])], {"a": 1.0}, missing_eos_penalty=-3.0)
    (scored,) = composed.score([rollout("stop", "length")])
    assert isinstance(scored, ScoredRollout)
    assert [s.value for s in scored.scores] == [1.0, -2.0]
    assert [s.parts["missing_eos_penalty"] for s in scored.scores] == [0.0, -3.0]


def test_a_score_takes_the_place_of_the_sum_where_length_cut():
    """`eos_truncate_and_penalty` of summarize_from_feedback_details (ppo.py, non_eos_penalty)."""
    raw, ends = [0.7, 3.0, 0.1, 0.4, 1e17], ["stop", "length", "stop", "stop", "length"]
    composed = RewardSum([Fixed("a", raw)], {"a": 1.0}, missing_eos_score=-1.0)
    (scored,) = composed.score([rollout(*ends)])
    assert isinstance(scored, ScoredRollout)
    assert [s.value for s in scored.scores] == [0.7, -1.0, 0.1, 0.4, -1.0]
    for score in scored.scores[:-1]:
        assert score.value == pytest.approx(sum(score.parts.values()))
    with pytest.raises(ValueError, match="leave one of them empty"):
        ScoreConfig(missing_eos_penalty=-1.0, missing_eos_score=-1.0)


def test_a_penalty_that_would_pay_for_being_cut_is_refused():
    with pytest.raises(ValueError, match=r"penalty=0\.5 .* pay for being cut; .* -1\.0 say"):
        ScoreConfig(missing_eos_penalty=0.5)
    for penalty in (0.0, -0.5):
        assert ScoreConfig(missing_eos_penalty=penalty).missing_eos_penalty == penalty


def test_a_failed_part_fails_its_whole_group_and_no_other():
    rewards = [Fixed("a", [1.0], [1.0]), Fixed("b", ScoreFailed("b broke"), [2.0])]
    first, second = RewardSum(rewards, {"a": 1.0, "b": 0.0}).score([rollout("stop")] * 2)
    assert isinstance(first, ScoreFailed) and str(first) == "b broke"
    assert isinstance(second, ScoredRollout) and second.scores[0].value == 1.0


def test_a_sum_that_overflows_is_a_failure():
    (failed,) = RewardSum([Fixed("a", [1e308])], {"a": 1e9}).score([rollout("stop")])
    assert isinstance(failed, ScoreFailed) and "not finite" in str(failed)


def test_configurations_that_cannot_work_say_what_to_do():
    tokenizer = train_tokenizer(["a"], 280, 24)
    rule = RewardPart(name="rule", function="builtins:len")
    with pytest.raises(ConfigError, match="distrl reward-model"):
        RewardSum.of(ScoreConfig(), tokenizer)
    assert RewardSum.of(ScoreConfig(parts=(rule,)), tokenizer).weights == {"rule": 1.0}


def test_a_name_that_is_taken_is_refused_by_the_configuration():
    rule = RewardPart(name="rule", function="builtins:len")
    with pytest.raises(ValueError, match="'rule' is taken"):
        ScoreConfig(parts=(rule, rule))
    for name in (PENALTY, OVERLONG, "mean", "std"):
        part = RewardPart(name=name, function="builtins:len")
        with pytest.raises(ValueError, match=f"'{name}' is taken.* choose another"):
            ScoreConfig(parts=(rule, part))


def test_the_run_s_own_reward_model_stands_in_for_no_parts():
    filled = with_default_part(ScoreConfig(), Path("runs/x/model"))
    (part,) = filled.parts
    assert (part.name, part.model, part.weight) == ("reward_model", "runs/x/model", 1.0)
    assert with_default_part(filled, Path("other")) is filled


def test_the_run_s_own_reward_model_is_found_where_a_part_says_so():
    rule = RewardPart(name="rule", function="builtins:len")
    parts = (rule, RewardPart(name="taste", model="own", weight=2.0))
    found = with_default_part(ScoreConfig(parts=parts), Path("runs/x/model")).parts
    assert found == (rule, RewardPart(name="taste", model="runs/x/model", weight=2.0))


@pytest.mark.parametrize(
    "tokens, penalty", [(1, 0.0), (16, 0.0), (18, -1.0), (20, -2.0), (40, -2.0)]
)
def test_an_overlong_response_costs_more_the_longer_it_is(tokens, penalty):
    """Yu et al. 2025, eq. 13, with L_max = 20 and a cache of 4, twice as dear."""
    config = OverlongConfig(penalty=2.0, start=16, full=20)
    assert overlong_penalty(tokens, config) == pytest.approx(penalty)


def test_the_overlong_penalty_stands_among_the_parts():
    config = OverlongConfig(penalty=5.0, start=1, full=2)
    (scored,) = RewardSum([Fixed("a", [1.0])], {"a": 1.0}, overlong=config).score([rollout("stop")])
    assert isinstance(scored, ScoredRollout)
    tokens = len(scored.rollout.samples[0].token_ids)
    assert scored.scores[0].parts["overlong"] == overlong_penalty(tokens, config)
    assert scored.scores[0].value == 1.0 + overlong_penalty(tokens, config)


def test_merit_is_the_sum_before_the_penalty_of_length():
    """What a cut response costs is part of it; without a penalty of length there is none."""
    config = OverlongConfig(penalty=5.0, start=1, full=2)
    for overlong, wanted in ((config, [1.0, 0.5]), (OverlongConfig(), [None, None])):
        composed = RewardSum([Fixed("a", [1.0, 2.0])], {"a": 1.0}, -1.5, overlong)
        (scored,) = composed.score([rollout("stop", "length")])
        assert isinstance(scored, ScoredRollout)
        assert [score.merit for score in scored.scores] == wanted
