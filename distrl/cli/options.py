"""From a command line to a `Config`: preset, then file, then dotted overrides.

pydantic-settings reads the words; the values of all sources are merged as plain
mappings and validated once, by `Config` itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, Field, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

from distrl.config import Config, ConfigError, preset_path, read_yaml


class CommandLine(Config, BaseSettings):
    """Every section of the configuration, and what only a command line has."""

    model_config = SettingsConfigDict(
        extra="forbid", protected_namespaces=(), cli_implicit_flags=True, cli_avoid_json=True
    )

    preset: str | None = Field(None, description="a named recipe: demo, smollm2")
    config: Path | None = Field(None, description="a YAML file of sections; goes over the preset")
    dry_run: bool = Field(
        False,
        validation_alias=AliasChoices("dry-run", "dry_run"),
        description="print the resolved configuration and what would be placed where, and stop",
    )
    resume: bool = Field(False, description="go on with the run that is in the run directory")
    fresh: bool = Field(False, description="redo finished stages, deleting what they left")


FLAGS = ("preset", "config", "dry_run", "resume", "fresh")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """A parsed command line."""

    config: Config
    dry_run: bool
    resume: bool
    fresh: bool


def parse(command: str, about: str, argv: list[str], default_preset: str | None = None) -> Options:
    """Read `argv` for `distrl <command>`. `--help` prints every field and exits.

    Raises ConfigError with a line for each wrong field.
    """
    source = CliSettingsSource[Any](
        CommandLine,
        cli_prog_name=f"distrl {command}",
        cli_parse_args=argv,
        cli_exit_on_error=True,
        cli_hide_none_type=True,
    )
    source.root_parser.description = about
    source.root_parser.usage = (
        f"distrl {command} [--preset NAME] [--config FILE.yaml] [--section.field VALUE ...]"
    )
    given = source()
    flags = {name: given.pop(name, None) for name in FLAGS} | _dashed(given)
    values: dict[str, Any] = {}
    preset = flags["preset"] or (default_preset if flags["config"] is None else None)
    if preset:
        values = read_yaml(preset_path(preset))
    if flags["config"]:
        values = merged(values, read_yaml(Path(flags["config"])))
    return Options(
        config=validated(merged(values, given)),
        dry_run=bool(flags["dry_run"]),
        resume=bool(flags["resume"]),
        fresh=bool(flags["fresh"]),
    )


def validated(values: dict[str, Any]) -> Config:
    """The configuration of these values. Raises ConfigError naming each wrong field."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            field = ".".join(str(part) for part in problem["loc"])
            lines.append(f"{field}: {_plain(problem)}" if field else _plain(problem))
        raise ConfigError("\n".join(lines)) from None


def _plain(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return "no such setting; 'distrl train --help' lists them all"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    return message if isinstance(given, dict) else f"{message}; got {given!r}"


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` with what `above` says, section by section."""
    out = dict(below)
    for key, value in above.items():
        mine = out.get(key)
        both = isinstance(mine, dict) and isinstance(value, dict)
        out[key] = merged(mine, value) if both else value
    return out


def _dashed(given: dict[str, Any]) -> dict[str, Any]:
    return {"dry_run": given.pop("dry-run")} if "dry-run" in given else {}
