"""What runs when: admission, buffer, staleness, fleets of workers, and the driver itself.

asyncio over the role protocols; neither Ray nor torch is known here.
"""

from distrl.driver.driver import Driver
from distrl.driver.errors import (
    DriverError,
    FleetExhausted,
    OutOfStep,
    StalenessBreach,
    Stalled,
)
from distrl.driver.state import Start, Summary

__all__ = [
    "Driver",
    "DriverError",
    "FleetExhausted",
    "OutOfStep",
    "StalenessBreach",
    "Stalled",
    "Start",
    "Summary",
]
