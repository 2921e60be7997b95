"""`distrl COMMAND ...`: finds the command, runs it, and turns errors into one message."""

from __future__ import annotations

import importlib
import logging
import os
import sys

from distrl import __version__
from distrl.config import ConfigError
from distrl.disk import full
from distrl.learn.allocator import keep_freed_memory

COMMANDS = {
    "demo": "everything in minutes: SFT, reward model, PPO and evaluation on human ratings",
    "sft": "supervised fine-tuning of a policy on demonstrations",
    "reward-model": "a reward model from human comparisons",
    "train": "PPO against the reward model; makes what is missing before it",
    "evaluate": "a trained policy against the one it started from, on held-out prompts",
    "replay": "a run's recorded batches again, to the same weights",
    "simulate": "the driver on a virtual clock: throughput, idle shares and ages at any size",
    "audit": "proves or refutes from a run's ledger what the driver promises",
}

USAGE = (
    "usage: distrl COMMAND [--preset NAME] [--config FILE.yaml] [--section.field VALUE ...]\n\n"
    + "\n".join(f"  {name:<14} {about}" for name, about in COMMANDS.items())
    + "\n\n'distrl COMMAND --help' explains every setting; '--dry-run' shows what would happen."
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if words[0] == "--version":
        print(f"distrl {__version__}")
        return 0
    command = words[0]
    find_own_modules()
    if command not in COMMANDS:
        print(f"distrl: no command {command!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    keep_freed_memory()
    module = importlib.import_module(f"distrl.cli.{command.replace('-', '_')}")
    try:
        return module.run(COMMANDS[command], words[1:])
    except known_errors() as error:
        print(f"distrl {command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        if not full(error):
            raise
        again = "free some space and give the same command again ('train' with --resume)"
        print(f"distrl {command}: {error}; {again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ndistrl {command}: interrupted", file=sys.stderr)
        return 130


def find_own_modules() -> None:
    """Let `module:function` be a file in the working directory, as under `python -m distrl.cli`:
    the console script's import path begins with the script's own folder. Ray adds the working
    directory to its workers' paths likewise. As with -m, PYTHONSAFEPATH keeps it out."""
    here = os.getcwd()
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.insert(0, here)


def known_errors() -> tuple[type[Exception], ...]:
    """Errors whose message says the cause and the fix; any other deserves its traceback."""
    from distrl.actors.cluster import PlacementError
    from distrl.checkpoint import CheckpointError, RunDirError
    from distrl.data.errors import DataError
    from distrl.disk import NotWritten
    from distrl.driver.errors import DriverError
    from distrl.evaluate.judge import JudgeFailed
    from distrl.learn.loop import TrainingFailed
    from distrl.learn.record import BadRecording
    from distrl.learn.state import StateMismatch
    from distrl.metrics import MetricsError
    from distrl.models.load import ModelError
    from distrl.roles import LearnerFailed, RoleError
    from distrl.sync.memory import NonFiniteWeights

    return (
        ConfigError,
        DataError,
        ModelError,
        TrainingFailed,
        BadRecording,
        PlacementError,
        NotWritten,
        MetricsError,
        JudgeFailed,
        StateMismatch,
        NonFiniteWeights,
        RunDirError,
        CheckpointError,
        DriverError,
        LearnerFailed,
        RoleError,
    )
