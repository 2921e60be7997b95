"""Reasons in kinds: of a thousand that differ in a reward's own words alone, people read one."""

from __future__ import annotations

import re

MOST = 500
"""Characters of a reason that is told on one line."""

_ERROR = re.compile(r"(?:[^\s:]+: )*[A-Z]\w+(?=: )")
_REWARD = re.compile(r"reward '\w+'(?: \([^)]*\))?(?: raised \w+|: \w+| \w+)")
_PLACE = re.compile(r" \([^()]*, line \d+\)(?=; prompt )")


def kind_of(reason: str) -> str:
    """A reason up to the text of the error in it: who failed, and the error's type; of a reward
    also its name, what it did, and the line of it that raised. One without an error is a kind."""
    error = _ERROR.match(reason)
    if error is None:
        return reason
    kind, text = error[0], reason[error.end() + 2 :]
    if (reward := _REWARD.match(text)) is None:
        return kind
    return f"{kind}: {reward[0]}{''.join(_PLACE.findall(text)[-1:])}"


def one_line(reason: str) -> str:
    """A reason on one line; where it is long without its middle, as its end may say where."""
    line = " ".join(reason.split())
    return line if len(line) <= MOST else f"{line[: MOST // 2]} … {line[-MOST // 2 :]}"
