"""The real driver on a virtual clock, with roles that only pass the time."""

from distrl.sim.clock import (
    Deadlock,
    LeftoverTasks,
    Livelock,
    OutOfTime,
    VirtualLoop,
    run_virtual,
)
from distrl.sim.fakes import FakeGenerator, FakeLearner, FakeScorer
from distrl.sim.ports import CountingSource, MemoryCheckpoints
from distrl.sim.script import Faults, fixed, log_normal

__all__ = [
    "CountingSource",
    "Deadlock",
    "FakeGenerator",
    "FakeLearner",
    "FakeScorer",
    "Faults",
    "LeftoverTasks",
    "Livelock",
    "MemoryCheckpoints",
    "OutOfTime",
    "VirtualLoop",
    "fixed",
    "log_normal",
    "run_virtual",
]
