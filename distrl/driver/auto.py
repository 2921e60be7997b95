"""`driver.max_staleness: auto`: as much overlap as the off-policyness of the data allows.

The signal is the effective sample size (ESS) of the importance weights, as a share: 1 where every
token was sampled by the present policy, less the further policy and data are apart.

    lower    by 1 after `PATIENCE` steps in a row below the target
    raise    by 1 after `PATIENCE` steps in a row above the target, with `MARGIN` to spare
    between  stay: the margin is the hysteresis

After a change the groups admitted before it have to pass first, so as many steps as may be on
their way do not count. A bound that had to be lowered is not tried again for `BACK_OFF` steps,
and for twice as long each time.
"""

from __future__ import annotations

PATIENCE = 3
MARGIN = 0.02
BACK_OFF = 20


class BoundController:
    """Moves a staleness bound between 0 and a ceiling.

    Attributes:
        bound: the bound now.
    """

    def __init__(self, *, start: int, ceiling: int, target: float) -> None:
        self.bound = min(start, ceiling)
        self._ceiling, self._target = ceiling, target
        self._below = self._above = 0
        self._passing = 0
        self._step = 0
        self._barred: dict[int, tuple[int, int]] = {}

    def update(self, ess: float) -> str | None:
        """Take in a step's ESS. Returns the cause where `bound` changed."""
        self._step += 1
        if self._passing:
            self._passing -= 1
            return None
        self._below = self._below + 1 if ess < self._target else 0
        self._above = self._above + 1 if ess > self._target + MARGIN else 0
        if self._below >= PATIENCE and self.bound > 0:
            self._bar()
            return self._move(-1, f"ESS {ess:.3f} is below the target {self._target:g}")
        if self._above >= PATIENCE and self.bound < self._ceiling and self._may_rise():
            return self._move(+1, f"ESS {ess:.3f} is above the target {self._target:g}")
        return None

    def _bar(self) -> None:
        """The present bound was too much: leave it alone for a while, longer each time."""
        _, wait = self._barred.get(self.bound, (0, BACK_OFF // 2))
        self._barred[self.bound] = (self._step + 2 * wait, 2 * wait)

    def _may_rise(self) -> bool:
        until, _ = self._barred.get(self.bound + 1, (0, 0))
        return self._step >= until

    def _move(self, by: int, cause: str) -> str:
        before, self.bound = self.bound, self.bound + by
        self._passing = max(before, self.bound) + 1
        self._below = self._above = 0
        return f"{before} -> {self.bound}: {cause} for {PATIENCE} steps"


class FixedBound:
    """A bound that nothing moves."""

    def __init__(self, bound: int) -> None:
        self.bound = bound

    def update(self, ess: float) -> str | None:
        """Never changes anything."""
        return None
