"""The command line: one file per command."""

from distrl.cli.main import main

__all__ = ["main"]
