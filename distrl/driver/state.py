"""Where a run starts, what it counts, and how it ended."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LEARNER_FOLDER = "learner"


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Where to go on from; the defaults are a run from nothing.

    Attributes:
        step: learner steps taken.
        version: the learner's version then.
        cursor: prompts below it were trained on or dropped; all others are issued again.
        samples: samples trained on so far.
        tokens: response tokens trained on so far.
        drops: dropped groups below `cursor`, by reason.
        ahead: prompts beyond `cursor` that were trained on or dropped all the same.
        bound: where `max_staleness: auto` had moved the staleness bound; None: nowhere yet.
        checkpoint: the folder to load the learner from; None: it stays as it is.
    """

    step: int = 0
    version: int = 0
    cursor: int = 0
    samples: int = 0
    tokens: int = 0
    drops: Mapping[str, int] = field(default_factory=dict)
    ahead: tuple[int, ...] = ()
    bound: int | None = None
    checkpoint: Path | None = None

    @classmethod
    def from_state(cls, state: Mapping[str, Any], checkpoint: Path) -> Start:
        """From what `Progress.state` gave to a checkpoint, and that checkpoint's folder."""
        return cls(
            step=state["step"],
            version=state["version"],
            cursor=state["cursor"],
            samples=state["samples"],
            tokens=state["tokens"],
            drops=state["drops"],
            ahead=tuple(state.get("ahead", ())),
            bound=state.get("bound"),
            checkpoint=checkpoint,
        )


@dataclass(slots=True)
class Progress:
    """The counts of a run, which change only in the learn loop, and what the watchdog reads.

    Attributes:
        moved_s: when a group last landed or a step last ended.
        doing: what the learn loop does, for an error message.
    """

    step: int
    version: int
    samples: int
    tokens: int
    moved_s: float
    doing: str = "loading the learner"

    @classmethod
    def of(cls, start: Start, now_s: float) -> Progress:
        return cls(start.step, start.version, start.samples, start.tokens, now_s)

    def state(
        self, cursor: int, ahead: Collection[int], drops: Mapping[str, int]
    ) -> dict[str, Any]:
        """What a checkpoint keeps; below `cursor`, and in `ahead`, all is settled."""
        return {
            "step": self.step,
            "version": self.version,
            "cursor": cursor,
            "samples": self.samples,
            "tokens": self.tokens,
            "drops": dict(drops),
            "ahead": sorted(ahead),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """How a run ended.

    Attributes:
        step: learner steps taken, those before a resume included.
        steps: learner steps of this run alone.
        version: the learner's version at the end.
        stopped: True where `Driver.stop` ended it.
        samples, tokens: totals trained on, those before a resume included.
        drops: dropped groups by reason, those before a resume included; where the run was
            stopped, those beyond the checkpoint's cursor are not counted: they are tried again.
        restarts: workers restarted in this run.
        seconds: wall-clock of this run.
    """

    step: int
    steps: int
    version: int
    stopped: bool
    samples: int
    tokens: int
    drops: Mapping[str, int]
    restarts: int
    seconds: float
