"""What a second demo makes anew, what it takes as it is, and what it says at its end.

Nothing is trained here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distrl.checkpoint import Checkpoints, RunDir
from distrl.cli import demo, main
from distrl.cli.demo import _next
from distrl.cli.options import Options
from distrl.config import Config
from distrl.driver.state import Summary
from distrl.models.folder import META_FILE

EVERYTHING = ["sft", "reward model", "PPO from nothing", "evaluation"]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, in order: each part leaves a note, and the files that the next one asks for.
    PPO is stopped at step 2 where the note "stop" is there."""
    notes: list[str] = []

    def sft(config: Config, out: Path, on_step: Any) -> Any:
        notes.append("sft")
        (out / "policy").mkdir(parents=True)
        return SimpleNamespace(parameters=1e6, validation_loss=1.0, seconds=1.0, truncated=0)

    def reward_model(config: Config, policy: Path, out: Path, on_step: Any) -> Any:
        notes.append("reward model")
        (out / "model").mkdir(parents=True)
        held_out = SimpleNamespace(accuracy={})
        return SimpleNamespace(held_out=held_out, seconds=1.0, truncated=0, alike=0)

    def train(options: Options, directory: RunDir) -> Summary:
        checkpoints = Checkpoints(directory.checkpoints)
        newest = checkpoints.latest() if options.resume else None
        notes.append(f"PPO from {f'step {newest.step}' if newest else 'nothing'}")
        stopped = "stop" in notes
        step = 2 if stopped else options.config.driver.steps
        if newest is None or newest.step < step:
            with checkpoints.write(step, {}) as folder:
                (folder / "x").write_text("x")
        if not stopped:
            directory.policy.mkdir(exist_ok=True)
            (directory.policy / META_FILE).write_text(json.dumps({"step": step}))
        return Summary(
            step=step, steps=step, version=step, stopped=stopped, samples=8, tokens=64, drops={},
            restarts=0, seconds=1.0,
        )  # fmt: skip

    monkeypatch.setattr("distrl.learn.sft.run_sft", sft)
    monkeypatch.setattr("distrl.learn.reward_model.run_reward_model", reward_model)
    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr("distrl.cli.train.check_rows", lambda config, **_: None)
    monkeypatch.setattr(demo, "evaluate", lambda config: notes.append("evaluation"))
    return notes


def run(root: Path, *words: str) -> int:
    return main(["demo", "--run.root", str(root), "--run.name", "d", *words])


def test_a_second_demo_takes_all_that_is_finished(
    done: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 0
    assert done == EVERYTHING
    said = capsys.readouterr().out
    assert f"{tmp_path / 'd'}/evaluation.json" in said and "What to try next" in said
    done.clear()
    assert run(tmp_path) == 0
    assert done == ["evaluation"]
    said = capsys.readouterr().out
    assert said.count("finished before, reusing") == 3
    assert f"PPO: finished before, reusing {tmp_path / 'd' / 'policy'}" in said


def test_fresh_makes_all_of_it_again(done: list[str], tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    assert run(tmp_path, "--fresh") == 0
    assert done == EVERYTHING * 2


def test_a_lost_stage_is_made_again_only_where_all_is(
    done: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 0
    done.clear()
    (tmp_path / "d" / "sft" / "stage.json").unlink()
    assert run(tmp_path) == 1 and done == []
    assert "which is no longer there: put it back" in capsys.readouterr().err
    assert run(tmp_path, "--fresh") == 0 and done == EVERYTHING


def test_a_demo_that_was_stopped_goes_on_by_itself(
    done: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done.append("stop")
    assert run(tmp_path) == 75
    assert done[1:] == EVERYTHING[:3], "there is nothing to evaluate yet"
    assert "stopped after step 2" in capsys.readouterr().out
    done.clear()
    assert run(tmp_path) == 0
    assert done == ["PPO from step 2", "evaluation"]


def test_more_steps_go_on_from_the_finished_ones(done: list[str], tmp_path: Path) -> None:
    assert run(tmp_path, "--driver.steps", "4") == 0
    done.clear()
    assert run(tmp_path, "--driver.steps", "6") == 0
    assert done == ["PPO from step 4", "evaluation"]


def test_an_export_that_is_missing_is_made(done: list[str], tmp_path: Path) -> None:
    """The run was killed between its last checkpoint and its export."""
    assert run(tmp_path, "--driver.steps", "4") == 0
    policy = tmp_path / "d" / "policy" / META_FILE
    for there in (None, '{"step": 2}'):  # or it is of an end before the last one
        policy.unlink() if there is None else policy.write_text(there)
        done.clear()
        assert run(tmp_path, "--driver.steps", "4") == 0
        assert done == ["PPO from step 4", "evaluation"]
    done.clear()
    assert run(tmp_path, "--driver.steps", "4") == 0
    assert done == ["evaluation"]


# -- its last words ------------------------------------------------------------------------


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
