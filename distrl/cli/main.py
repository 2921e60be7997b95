"""`distrl COMMAND ...`: finds the command, runs it, and turns errors into one message."""

from __future__ import annotations

import importlib
import logging
import os
import sys

from distrl import __version__
from distrl.cli.options import options_of
from distrl.config import ConfigError
from distrl.disk import full
from distrl.errors import UserError
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

OF_SETTINGS = ("demo", "sft", "reward-model", "train", "evaluate")
"""Commands that take settings and flags alone; the others read their own words."""

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
    try:
        return _run(command, COMMANDS[command], words[1:])
    except UserError as error:
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


def _run(command: str, about: str, argv: list[str]) -> int:
    """What is wrong with the words is said before what the command stands on is imported, which
    takes ten seconds (torch and transformers)."""
    name = f"distrl.cli.{command.replace('-', '_')}"
    if command not in OF_SETTINGS:
        return importlib.import_module(name).run(about, argv)
    options = options_of(command, about, argv)
    return importlib.import_module(name).run(options)


def find_own_modules() -> None:
    """Let `module:function` be a file in the working directory, as under `python -m distrl.cli`:
    the console script's import path begins with the script's own folder. Ray adds the working
    directory to its workers' paths likewise. As with -m, PYTHONSAFEPATH keeps it out."""
    here = os.getcwd()
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.insert(0, here)
