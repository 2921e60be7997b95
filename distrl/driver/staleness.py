"""Staleness: what is too old for a gradient.

Age of a token = learner's version at the gradient − version that sampled it. With a lead of
`max_staleness` admission makes a breach impossible (`admission.py` has the proof), and the check
at consumption raises all the same. With a longer lead groups do become too old, and go:

    drop   a group with a token that is too old is given up, and another prompt taken for it:
           in the buffer and in flight when the version changes (before the engines are paused for
           the new weights), or as it lands
    mask   its old tokens are left out of the gradient; a group that has no other goes as above
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distrl.driver.buffer import Landed
from distrl.driver.errors import StalenessBreach
from distrl.records import GroupInfo

STALE = "too old"
"""Reason of a drop, in metrics and ledger."""


@dataclass(kw_only=True, slots=True)
class StalenessRule:
    """The bound, and what happens to what is beyond it; None: nothing ever may be.

    The bound may move (`auto.py`): a group is held to the one that it was admitted under.
    """

    bound: int
    on_stale: Literal["drop", "mask"] | None

    def floor(self, version: int) -> int:
        """The oldest version that a gradient at `version` may have tokens of."""
        return version - self.bound

    def masks_below(self, version: int) -> int:
        """Tokens of older versions than this are to be left out of a gradient at `version`."""
        return self.floor(version) if self.on_stale == "mask" else 0

    def dooms(self, oldest: int, newest: int, version: int) -> bool:
        """Whether a group of these versions is of no use to a learner of `version`."""
        if self.on_stale is None:
            return False
        return (oldest if self.on_stale == "drop" else newest) < self.floor(version)

    def dooms_group(self, group: GroupInfo, version: int) -> bool:
        return self.on_stale is not None and self.dooms(
            group.oldest_version, group.newest_version, version
        )


def check_ages(batch: Sequence[Landed], version: int, rule: StalenessRule) -> list[int]:
    """How many tokens of each group are masked, as older than its bound, at a learner of `version`.

    Raises StalenessBreach where a token is older than the bound and not masked, or was stamped
    with a version that the learner has not reached.
    """
    return [_check(landed, version, rule) for landed in batch]


def _check(landed: Landed, version: int, rule: StalenessRule) -> int:
    group, floor = landed.parcel.info.group, version - landed.bound
    masks = rule.on_stale == "mask" and group.newest_version >= floor
    if group.oldest_version < floor and not masks:
        raise StalenessBreach(
            f"group {group.index} (prompt {group.prompt_id!r}, {group.generator}) has a token of "
            f"version {group.oldest_version} at a learner of version {version}: older than "
            f"max_staleness={landed.bound}. Admission should have made this impossible; please "
            "report it with the run's metrics"
        )
    if group.newest_version > version:
        raise StalenessBreach(
            f"group {group.index} ({group.generator}) has a token of version "
            f"{group.newest_version}, which the learner (version {version}) has not published; "
            "was a generator left over from another run?"
        )
    return tokens_below(group, floor)


def tokens_below(group: GroupInfo, floor: int) -> int:
    """Tokens of a group that versions before `floor` sampled."""
    return sum(
        span.end - span.start for spans in group.spans for span in spans if span.version < floor
    )
