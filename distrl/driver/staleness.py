"""Staleness at consumption: the check behind the prevention, and where the age came from.

Age of a token = learner's version at the gradient − version that sampled it. Admission makes a
breach impossible (`admission.py` has the proof); this raises all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distrl.driver.buffer import Landed
from distrl.driver.errors import StalenessBreach


@dataclass(frozen=True, kw_only=True, slots=True)
class Age:
    """Age of a group's oldest token, in versions: what passed in flight and what in the buffer."""

    in_flight: int
    in_buffer: int

    @property
    def versions(self) -> int:
        return self.in_flight + self.in_buffer


def check_ages(batch: Sequence[Landed], version: int, max_staleness: int) -> list[Age]:
    """The age of each group at a learner of `version`.

    Raises StalenessBreach where a token is older than `max_staleness`, or was stamped with a
    version that the learner has not reached.
    """
    return [_check(landed, version, max_staleness) for landed in batch]


def _check(landed: Landed, version: int, max_staleness: int) -> Age:
    group = landed.parcel.info.group
    if version - group.oldest_version > max_staleness:
        raise StalenessBreach(
            f"group {group.index} (prompt {group.prompt_id!r}, {group.generator}) has a token of "
            f"version {group.oldest_version} at a learner of version {version}: older than "
            f"max_staleness={max_staleness}. Admission should have made this impossible; please "
            "report it with the run's metrics"
        )
    if group.newest_version > version:
        raise StalenessBreach(
            f"group {group.index} ({group.generator}) has a token of version "
            f"{group.newest_version}, which the learner (version {version}) has not published; "
            "was a generator left over from another run?"
        )
    return Age(
        in_flight=landed.landed_version - group.oldest_version,
        in_buffer=version - landed.landed_version,
    )
