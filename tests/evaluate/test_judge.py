from __future__ import annotations

import pytest

from distrl.config import Config, ConfigError
from distrl.evaluate import JudgeFailed, resolve_judge, vader_compound


def test_vader_tells_praise_from_blame():
    assert vader_compound("a wonderful, moving film") > 0.5
    assert vader_compound("a dull and horrible mess") < -0.5
    assert vader_compound("the film has two parts") == 0.0


def test_the_default_judge_resolves():
    path = Config().evaluate.judge
    assert path is not None
    assert resolve_judge(path)("good") == vader_compound("good")


@pytest.mark.parametrize(
    "path", ["math", "math:", "nowhere_at_all:f", "math:no_such_thing", "math:pi"]
)
def test_what_is_no_judge_is_an_error_that_names_it(path):
    with pytest.raises(ConfigError, match=path):
        resolve_judge(path)


def test_a_failing_judge_is_a_failure_and_not_a_number():
    with pytest.raises(JudgeFailed, match="ValueError"):
        resolve_judge("builtins:float")("not a number")
    with pytest.raises(JudgeFailed, match="nan"):
        resolve_judge("builtins:float")("nan")
