"""`--help`: every setting by section, with its type, its value and what it means."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table

from distrl.config import PRESETS, Config, RewardPart

PLAIN_WIDTH = 120
"""Columns of the help where the output is no terminal."""

METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}

FLAGS = {
    "--preset NAME": "a recipe that comes with distrl: "
    + ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml"))),
    "--config FILE.yaml": "your own settings, by section; they go over the preset's",
    "--dry-run": "print the resolved settings, what would be placed where and which stages would "
    "be made, read the rows, and stop",
}

RUN_FLAGS = {
    "--resume": "go on with the run that is in the run directory",
    "--fresh": "do it anew, deleting what this command left in the run directory",
}
HONOURED = {
    "demo": ("--resume", "--fresh"),
    "train": ("--resume", "--fresh"),
    "sft": ("--fresh",),
    "reward-model": ("--fresh",),
}
"""Commands that take some of RUN_FLAGS; the others take none."""


def usage(command: str) -> str:
    return (
        f"usage: distrl {command} [--preset NAME] [--config FILE.yaml] [--section.field VALUE ...]"
    )


def print_help(command: str, about: str, values: Config) -> None:
    """Everything that can be said on the command line, for people; each setting with what it is in
    `values`."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print(f"{usage(command)}\n\n{about[0].upper()}{about[1:]}.\n")
    console.print("Beside each setting stands what preset, file and words make of it.\n")
    flags = FLAGS | {name: RUN_FLAGS[name] for name in HONOURED.get(command, ())}
    console.print(_table((name, "", text) for name, text in flags.items()))
    for section, model in sections():
        console.print(f"\n{section}", style="bold", end="")
        console.print(f": {(model.__doc__ or '').splitlines()[0]}")
        console.print(_table(_rows(section, model, attrgetter(section)(values))))


def sections(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, model) of each section, those within a section after it."""
    for name, field in model.model_fields.items():
        if _is_section(field):
            yield f"{prefix}{name}", field.annotation
            yield from sections(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]


def settings() -> Iterator[tuple[str, FieldInfo]]:
    """(dotted name, field) of every setting that has a value of its own."""
    for section, model in sections():
        for name, field in model.model_fields.items():
            if not _is_section(field):
                yield f"{section}.{name}", field


def did_you_mean(name: str, dashes: str = "") -> str:
    """' (did you mean …?)' where a setting is called almost like `name`, else nothing."""
    return nearest(name, [known for known, _ in settings()], 0.75, dashes)


def nearest(name: str, known: Iterable[str], likeness: float, dashes: str = "") -> str:
    """' (did you mean …?)' where one of `known` is so like `name` (0 to 1), else nothing."""
    close = get_close_matches(name, known, n=1, cutoff=likeness)
    return f" (did you mean {dashes}{close[0]}?)" if close else ""


def _rows(
    section: str, model: type[BaseModel], values: BaseModel
) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        if not _is_section(field):
            kind, choices = _kind(field.annotation)
            yield (
                f"--{section}.{name} {kind}".rstrip(),
                _value(getattr(values, name)),
                f"{field.description}{choices}",
            )


def _kind(annotation: Any) -> tuple[str, str]:
    """What stands for the value in the help, and the choices where there are some."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation, *others = (a for a in get_args(annotation) if a is not type(None))
        if annotation is bool:  # it has a third state, so a flag cannot say it
            return "NAME", " (true, false)"
        if others:  # a number, or one of some words
            return METAVARS[annotation], f" (or {', '.join(get_args(others[0]))})"
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        name = "NAME" if isinstance(choices[0], str) else METAVARS[type(choices[0])]
        return name, f" ({', '.join(map(str, choices))})"
    if get_origin(annotation) is tuple:
        first, second = get_args(annotation)
        return ("JSON", "") if second is Ellipsis else (f"{METAVARS[first]},{METAVARS[second]}", "")
    return ("", " (or --no-…)") if annotation is bool else (METAVARS[annotation], "")


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, RewardPart):
        return value.name
    return ",".join(map(_value, value)) if isinstance(value, tuple) else str(value)


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _table(rows: Any) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(min_width=37, no_wrap=True)
    table.add_column(min_width=12, max_width=24, overflow="fold", style="cyan")
    table.add_column(ratio=1)
    for option, default, text in rows:
        table.add_row(f"  {option}", default, text)
    return table
