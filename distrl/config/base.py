"""What all sections are: frozen, complete, and without unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from distrl.errors import UserError


class ConfigError(UserError, ValueError):
    """The configuration cannot work; the message names the field and the fix."""


class Section(BaseModel):
    """Frozen, and unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )
