"""Rule rewards: resolved at construction, checked at every call."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from distrl.config import ConfigError
from distrl.records import Prompt, Rollout, Sample, VersionSpan
from distrl.roles import ScoreFailed
from distrl.score import RuleReward


@pytest.fixture(autouse=True)
def module(monkeypatch):
    made = types.ModuleType("my_rewards")
    rules = {
        "length": lambda *, prompt, response, meta: len(response) + meta.get("more", 0),
        "picky": lambda *, prompt, response, meta: 1 / (len(response) - 3),
        "infinite": lambda *, prompt, response, meta: float("inf") if "c" in response else 0,
        "words": lambda *, prompt, response, meta: "many",
        "leaves": lambda *, prompt, response, meta: sys.exit(3) if "c" in response else 0,
        "number": 3,
    }
    vars(made).update(rules)
    monkeypatch.setitem(sys.modules, "my_rewards", made)


def rollout(*texts: str, prompt_id: str = "p", meta=None) -> Rollout:
    ids = np.array([5, 1], np.int32)
    samples = tuple(
        Sample(
            text=text,
            token_ids=ids,
            logprobs=np.zeros(2, np.float32),
            spans=(VersionSpan(version=0, start=0, end=2),),
            finish_reason="stop",
        )
        for text in texts
    )
    prompt = Prompt(
        index=0, epoch=0, prompt_id=prompt_id, text="say", token_ids=ids, meta=meta or {}
    )
    return Rollout(prompt=prompt, samples=samples, generator="g")


def test_it_gets_prompt_response_and_meta_by_name():
    reward = RuleReward("length", "my_rewards:length")
    assert reward.scores([rollout("a", "abc"), rollout("ab", meta={"more": 10})]) == [[1, 3], [12]]


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        ("picky", "ZeroDivisionError"),
        ("infinite", "not finite"),
        ("words", "could not convert"),
        ("leaves", "raised SystemExit: 3 ("),
    ],
)
def test_a_failure_is_that_group_s_alone_and_says_why(function, cause):
    reward = RuleReward("rule", f"my_rewards:{function}")
    good, bad = rollout("a", "ab"), rollout("a", "abc", prompt_id="the bad one")
    first, second = reward.scores([good, bad])
    assert isinstance(second, ScoreFailed)
    assert cause in str(second) and "'the bad one'" in str(second) and "my_rewards" in str(second)
    assert isinstance(first, ScoreFailed) == (function == "words")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere_at_all:f", "cannot import nowhere_at_all"),
        ("my_rewards:absent", r"has no absent; it has .*length"),
        ("my_rewards:number", "is a int, not a function"),
        ("my_rewards", "not of the form"),
        (":f", "not of the form"),
    ],
)
def test_a_function_that_is_not_there_is_a_configuration_error(path, message):
    with pytest.raises(ConfigError, match=message):
        RuleReward("rule", path)
