"""Reasons in kinds, as the roles word them."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest

from distrl.driver.reason import MOST, kind_of, one_line
from distrl.records import Prompt
from distrl.roles import ScoreFailed
from distrl.score import RuleReward


def picky(*, prompt, response, meta):
    raise ValueError(f"cannot parse; prompt {response} (a, line 3)")


def test_what_a_reward_raises_is_one_kind_whatever_it_says(monkeypatch):
    made = types.ModuleType("my_rewards")
    vars(made)["picky"] = picky
    monkeypatch.setitem(sys.modules, "my_rewards", made)
    kinds = set()
    for i, response in enumerate(["a", "b: c", "'(\n)'"]):
        prompt = Prompt(
            index=i, epoch=0, prompt_id=f"p{i}", text="say", token_ids=np.array([1], np.int32)
        )
        with pytest.raises(ScoreFailed) as failed:
            RuleReward("mine", "my_rewards:picky").number(prompt, response)
        kinds.add(kind_of(f"scorer: ScoreFailed: {failed.value}"))
    line = picky.__code__.co_firstlineno + 1
    raised = "reward 'mine' (my_rewards:picky) raised ValueError"
    assert kinds == {f"scorer: ScoreFailed: {raised} ({__file__}, line {line})"}


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("no signal", None),
        ("too old: in the buffer", None),
        ("PayloadLost: s0: a payload is lost", "PayloadLost"),
        ("g0: RoleError: g0: it is: gone", "g0: RoleError"),
        ("scorer: NeverScored: scorer-0 gave no score for prompt 'p'", "scorer: NeverScored"),
        (
            "scorer: ScoreFailed: reward 'm': RuntimeError: tried 2 GiB",
            "scorer: ScoreFailed: reward 'm': RuntimeError",
        ),
        (
            "ScoreFailed: reward 'm' gave [nan], not all finite, for prompt 'p'",
            "ScoreFailed: reward 'm' gave",
        ),
        (
            "ScoreFailed: reward 'r' (a:b) answered nan, which is not finite; prompt 'p'",
            "ScoreFailed: reward 'r' (a:b) answered",
        ),
    ],
)
def test_a_kind_ends_where_the_error_s_own_text_begins(reason, kind):
    assert kind_of(reason) == (kind or reason)


def test_a_long_reason_is_told_on_one_line_with_its_end():
    told = one_line("begins" + " \n x" * 9999 + " ends")
    assert told.startswith("begins x x") and told.endswith("x ends") and "\n" not in told
    assert len(told) <= MOST + 3
