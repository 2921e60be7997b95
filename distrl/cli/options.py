"""From a command line to a `Config`: preset, then file, then dotted overrides.

pydantic-settings reads the words; the values of all sources are merged as plain
mappings and validated once, by `Config` itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_origin

from pydantic import AliasChoices, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from distrl.checkpoint import RunDir
from distrl.cli.help import HONOURED, RUN_FLAGS, did_you_mean, nearest, print_help, settings
from distrl.config import Config, ConfigError, RewardPart, preset_path, read_yaml


class CommandLine(Config, BaseSettings):
    """Every section of the configuration, and what only a command line has (see `help.FLAGS`)."""

    model_config = SettingsConfigDict(
        extra="forbid", protected_namespaces=(), cli_implicit_flags=True, cli_avoid_json=True
    )

    preset: str | None = None
    config: Path | None = None
    dry_run: bool = Field(default=False, validation_alias=AliasChoices("dry-run", "dry_run"))
    resume: bool = False
    fresh: bool = False


EXPLAINED = "'distrl train --help' explains them all"

OF_A_PART = f"a part of the reward has {', '.join(RewardPart.model_fields)}"

HELP = {"-h", "--help"}

LISTS = ("[", "{")
"""How JSON of more than one value begins."""

FLAGS = ("preset", "config", "dry_run", "resume", "fresh")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """A parsed command line."""

    config: Config
    dry_run: bool
    resume: bool
    fresh: bool


def options_of(command: str, about: str, argv: list[str]) -> Options:
    """What is said to a command that takes settings and flags alone. Raises ConfigError."""
    if command == "demo":
        return parse(command, about, argv, default_preset="demo")
    if command == "evaluate" and not HELP & set(argv):
        return parse(command, about, argv, made_with=_made_with(argv))
    return parse(command, about, argv)


def _made_with(argv: list[str]) -> dict[str, Any]:
    """The settings of the run that a command line names, if it has any."""
    directory = RunDir(run_dir_of(argv))
    return config_of(directory).model_dump(mode="json") if directory.config.exists() else {}


def parse(
    command: str,
    about: str,
    argv: list[str],
    default_preset: str | None = None,
    beneath: dict[str, Any] | None = None,
    made_with: dict[str, Any] | None = None,
) -> Options:
    """Read `argv` for `distrl <command>`. `--help` prints every setting and exits.

    `default_preset` is the preset where the words name none; `beneath` are values that preset, file
    and words are laid over; `made_with` those of a run that is there, which file and words alone
    are laid over. Raises ConfigError with a
    line for each wrong field.
    """
    if HELP & set(argv):
        print_help(command, about, shown(argv, default_preset))
        raise SystemExit(0)
    values, flags = _values(argv, default_preset, beneath or {}, made_with or {})
    _check_honoured(command, flags)
    return Options(
        config=validated(values),
        dry_run=bool(flags["dry_run"]),
        resume=bool(flags["resume"]),
        fresh=bool(flags["fresh"]),
    )


def shown(argv: list[str], default_preset: str | None = None) -> Config:
    """The values that help has to show: what preset, file and words come to, or the preset alone
    where the words are not right yet, as then help is asked for."""
    try:
        values, _ = _values([word for word in argv if word not in HELP], default_preset, {}, {})
        return validated(values)
    except ConfigError:
        values, _ = _values([], default_preset, {}, {})
        return validated(values)


def run_dir_of(argv: list[str]) -> Path:
    """The run directory that a command line names; the rest of it may be wrong as it stands, and
    right over what that run was made with."""
    values, _ = _values(argv, None, {}, {})
    return validated({"run": values.get("run", {})}).run.dir


def _values(
    argv: list[str],
    default_preset: str | None,
    beneath: dict[str, Any],
    made_with: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of all sources, and the flags."""
    _check_one_source(argv)
    given = _given(argv)
    flags = {name: given.pop(name, None) for name in FLAGS} | _dashed(given)
    if preset := flags["preset"] or default_preset:
        beneath = merged(beneath, read_yaml(preset_path(preset)))
    values = merged(beneath, made_with)
    if flags["config"]:
        values = merged(values, read_yaml(Path(flags["config"])))
    return merged(values, given), flags


def _check_one_source(argv: list[str]) -> None:
    """Raise ConfigError where there are two presets or two files: the first would be lost."""
    for name, way in (("--preset", "name one"), ("--config", "put what they say into one file")):
        parts = [part for word in argv for part in _parted(word, {name})]
        values = [value for flag, value in pairwise(parts) if flag == name]
        if len(values) > 1:
            raise ConfigError(
                f"{name} is given twice, {' and '.join(values)}, and the last alone would count; "
                f"{way}"
            )


def _check_honoured(command: str, flags: dict[str, Any]) -> None:
    """Raise ConfigError for a flag that this command would pass over."""
    for name in RUN_FLAGS:
        if flags[name.removeprefix("--")] is not None and name not in HONOURED.get(command, ()):
            takers = ", ".join(other for other, names in HONOURED.items() if name in names)
            raise ConfigError(
                f"'distrl {command}' takes no {name}; leave it out ({name} is for: {takers})"
            )


def _as_flags(argv: list[str]) -> list[str]:
    """`--flag true` and `--flag=false`, as messages have it, as the flags that they stand for."""
    flags = {f"--{name}" for name, field in settings() if field.annotation is bool}
    flags |= {"--dry-run", "--dry_run", *RUN_FLAGS}
    out: list[str] = []
    for word in (part for given in argv for part in _parted(given, flags)):
        if out and out[-1] in flags and word.lower() in ("true", "false"):
            out[-1] = out[-1] if word.lower() == "true" else f"--no-{out[-1].removeprefix('--')}"
        else:
            out.append(word)
    return out


def _parted(word: str, flags: set[str]) -> list[str]:
    name, equals, value = word.partition("=")
    return [name, value] if equals and name in flags else [word]


def _given(argv: list[str]) -> dict[str, Any]:
    """What stands on the command line, by section. Raises ConfigError for words it cannot read."""
    source = CliSettingsSource[Any](CommandLine, cli_exit_on_error=False)
    try:
        return dict(source(args=_as_flags(argv))())
    except SettingsError as error:
        trouble = str(error).removeprefix("error parsing CLI: ")
        if isinstance(error.__cause__, ValueError):
            words = ", ".join(w for w in argv if w.partition("=")[2][:1] in LISTS or w[:1] in LISTS)
            if not words:
                words = f"{', '.join(_unread(argv))}, which wants numbers as 0.9 or 10"
            raise ConfigError(f"{words}: this is no JSON ({error.__cause__})") from None
        unknown = [word for word in trouble.split() if word.startswith("--")]
        if not trouble.startswith("unrecognized arguments") or not unknown:
            raise ConfigError(f"{trouble}; {EXPLAINED}") from None
        name = unknown[0].split("=")[0]
        raise ConfigError(
            f"no setting {name}{did_you_mean(name.removeprefix('--'), '--')}; {EXPLAINED}"
        ) from None


def _unread(argv: list[str]) -> Iterator[str]:
    """The settings of several values that cannot be read, each with what is said of it."""
    names = {f"--{name}" for name, field in settings() if get_origin(field.annotation) is tuple}
    source = CliSettingsSource[Any](CommandLine, cli_exit_on_error=False)
    for name, value in pairwise(part for word in argv for part in _parted(word, names)):
        if name in names:
            try:
                source(args=[name, value])()
            except SettingsError:
                yield f"{name} {value}"


def config_of(directory: RunDir) -> Config:
    """The configuration that a run was made with, wherever its directory lies now."""
    if not directory.config.exists():
        raise ConfigError(f"{directory.path} has no config.yaml; is it a run directory?")
    made_with = read_yaml(directory.config)
    if not made_with:
        raise ConfigError(f"{directory.config} is empty; put the run's own one back")
    here = {"run": {"root": str(directory.path.parent), "name": directory.path.name}}
    return validated(merged(made_with, here))


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
        name = ".".join(str(part) for part in problem["loc"])
        if any("." in str(part) for part in problem["loc"]) and name in dict(settings()):
            *sections, field = name.split(".")
            nested = " under ".join(f"`{part}:`" for part in [field, *reversed(sections)])
            return f"dotted names are for the command line; in a file, nest {nested}"
        if any(isinstance(part, int) for part in problem["loc"]):  # a part of the reward
            meant = nearest(str(problem["loc"][-1]), RewardPart.model_fields, 0.6)
            return f"no such setting{meant}; {OF_A_PART}"
        return f"no such setting{did_you_mean(name)}; {EXPLAINED}"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    return message if isinstance(given, dict) else f"{message}; got {given!r}"


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` with what `above` says, section by section."""
    out = dict(below)
    for key, value in above.items():
        mine = out.get(key)
        if isinstance(mine, dict) and isinstance(value, dict):
            value = merged(mine, value)
        out[key] = value
    return out


def _dashed(given: dict[str, Any]) -> dict[str, Any]:
    return {"dry_run": given.pop("dry-run")} if "dry-run" in given else {}
