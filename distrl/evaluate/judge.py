"""Independent judges: a number for a text, from something that training never saw."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from distrl.config import resolve
from distrl.errors import UserError

Judge = Callable[[str], float]

MEND = "mend it, or go without by --evaluate.judge None"


class JudgeFailed(UserError):
    """A judge raised, or answered something that is not a finite number."""


def vader_compound(text: str) -> float:
    """Sentiment of `text` from -1 to 1, by VADER's lexicon and rules (Hutto & Gilbert 2014)."""
    return float(_vader().polarity_scores(text)["compound"])


@cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()  # reads its lexicon from disk: 50 ms


def resolve_judge(path: str) -> Judge:
    """The judge that 'module:function' names, its answers checked.

    Raises ConfigError where there is none; the judge itself raises JudgeFailed, never
    a number in place of a failure.
    """
    function = resolve(path, "evaluate.judge")

    def judge(text: str) -> float:
        try:
            value = float(function(text))
        except Exception as error:  # a user's function may raise anything
            raise JudgeFailed(
                f"evaluate.judge={path} raised {type(error).__name__}: {error}; {MEND}"
            ) from error
        if not math.isfinite(value):
            raise JudgeFailed(f"evaluate.judge={path} answered {value} for {text[:80]!r}; {MEND}")
        return value

    return judge
