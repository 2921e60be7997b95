"""What a user reads instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """An error whose message says the cause and the fix. Every command prints that alone; any other
    error deserves its traceback."""
