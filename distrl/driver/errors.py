"""Why a run ends before its time. Each is raised by `Driver.run`."""

from __future__ import annotations

from distrl.errors import UserError


class DriverError(UserError):
    """The run cannot go on."""


class StalenessBreach(DriverError):
    """A token beyond the staleness bound was about to reach a gradient."""


class OutOfStep(DriverError):
    """Steps, versions or prompt indices do not follow each other as they should."""


class FleetExhausted(DriverError):
    """Every worker of a role has used up its restarts."""


class Stalled(DriverError):
    """Nothing landed and nothing was learned for `driver.stall_timeout_s`."""
