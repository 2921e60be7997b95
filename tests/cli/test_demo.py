"""What the demo says at its end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from distrl.cli.demo import _next
from distrl.config import Config


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`distrl` as `make demo` calls it, in a folder that is not on the path."""
    path = tmp_path / ".venv" / "bin" / "distrl"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [".venv/bin/distrl", "demo"])
    monkeypatch.setenv("PATH", "/nowhere")
    return path


def commands() -> list[str]:
    """The commands that are worth trying, without what is said of them."""
    tried = _next(Config(), 60).split("What to try next:\n")[1]
    return [line.strip().split("   ")[0].split(" --")[0] for line in tried.splitlines()]


def test_the_commands_to_try_next_can_be_copied(script: Path) -> None:
    assert commands() == [f".venv/bin/distrl {word}" for word in ("demo", "demo", "train", "train")]


def test_they_are_short_where_the_command_is_on_the_path(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join(["/nowhere", str(script.parent)]))
    assert commands()[0] == "distrl demo"


def test_another_distrl_on_the_path_is_not_this_one(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "distrl"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commands()[0] == ".venv/bin/distrl demo"


def test_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/lib/distrl/cli/__main__.py", "demo"])
    assert commands()[0] == "python -m distrl.cli demo"
