"""What is wrong with data: one error type, whose message names the place and the fix."""

from __future__ import annotations

from distrl.errors import UserError


class DataError(UserError, ValueError):
    """Data cannot be fetched, read or used. The message is for the person who runs distrl."""


class NoRows(DataError):
    """No row of a file falls into a split."""
