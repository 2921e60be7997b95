"""A checkpoint goes on from the tokenizer, the policy and the rewards that its run began with."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distrl.checkpoint import Checkpoint, Checkpoints, RunDir, RunDirError
from distrl.cli import main
from distrl.cli.options import Options
from distrl.cli.origin import (
    BLOCK,
    BLOCKS,
    changed,
    check_origin,
    check_same_start,
    model_digest,
    origin_of,
)
from distrl.cli.train import train
from distrl.config import Config, dump_yaml
from distrl.models.folder import META_FILE

RULE = {"name": "rule", "function": "builtins:len"}


def recipe(root: Path, policy: Path, **sections: Any) -> Config:
    rows = root / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "number {n}"}}\n' for n in range(40)))
    values = {
        "run": {"name": "r", "root": str(root)},
        "model": {"path": str(policy)},
        "sft": {"epochs": 0},
        "data": {"source": str(rows)},
        "score": {"parts": [RULE]},
        "learn": {"value": {"start": "policy"}},
        "driver": {"ledger": False},
    }
    return Config.model_validate(values | sections)


def test_a_digest_is_of_what_was_trained_and_of_nothing_else(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    size = 3 * BLOCK * BLOCKS + 1000
    (model / "model.safetensors").write_bytes(bytes(size))
    (model / META_FILE).write_text('{"gain": 1}')
    first = model_digest(model)
    shutil.copytree(model, tmp_path / "copy")
    (model / "config.json").write_text("{}")
    assert model_digest(tmp_path / "copy") == model_digest(model) == first
    (model / META_FILE).write_text('{"gain": 2}')
    assert model_digest(model) != first, "the scale of its rewards"
    for content in (bytes([1]) * size, bytes(size + 1)):
        (tmp_path / "copy" / "model.safetensors").write_bytes(content)
        assert model_digest(tmp_path / "copy") != first


def test_every_reward_model_has_its_digest(tiny_policy: Path, tmp_path: Path) -> None:
    parts = [RULE, {"name": "taste", "model": str(tmp_path / "taste")}]
    settings = recipe(tmp_path, tiny_policy, score={"parts": parts})
    assert origin_of(settings, tiny_policy).keys() == {
        "tokenizer", "policy", "reward model 'taste'",
    }  # fmt: skip


def test_what_changed_is_said(tmp_path: Path) -> None:
    then = {"tokenizer": "a", "policy": "b", "reward model 'r'": "c"}
    checkpoint = Checkpoint(step=4, path=tmp_path, state={"origin": then})
    check_origin(checkpoint, dict(then))
    with pytest.raises(RunDirError, match="another policy, another tokenizer than") as told:
        check_origin(checkpoint, then | {"tokenizer": "x", "policy": "y"})
    assert "reward model" not in str(told.value) and "another --run.name" in str(told.value)
    with pytest.raises(RunDirError, match="another reward model 'r' than"):
        check_origin(checkpoint, then | {"reward model 'r'": "x"})


def test_a_chat_template_is_part_of_what_prompts_say(tiny_policy: Path, tmp_path: Path) -> None:
    policy = shutil.copytree(tiny_policy, tmp_path / "policy")
    plain = recipe(tmp_path, policy)
    rows = plain.data.model_copy(update={"chat": True})
    chat = plain.model_copy(update={"data": rows})
    template = policy / "chat_template.jinja"
    found = []
    for text in ("{{ messages[0].content }}", "{{ messages[0].content }}!"):
        template.write_text(text)
        found.append((origin_of(plain, policy), origin_of(chat, policy)))
    (plain_before, before), (plain_after, after) = found
    assert plain_before == plain_after
    assert changed({"origin": before}, after) == "chat template"
    assert changed({"origin": plain_before}, after) == "", "an earlier version says nothing of it"


@pytest.mark.parametrize("command", ["replay {run}", "evaluate --run.name r --run.root {root}"])
def test_a_run_is_looked_at_with_what_it_began_with(
    command: str,
    tiny_policy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = recipe(tmp_path, tiny_policy)
    run = RunDir(settings.run.dir)
    with run.claim(dump_yaml(settings)):
        run.begin()
    monkeypatch.setattr("distrl.learn.record.recorded", lambda _: iter([1]))
    now = origin_of(settings, tiny_policy)
    for step, began in ((1, now), (2, now | {"policy": "another"})):
        with Checkpoints(run.checkpoints).write(step, {"origin": began}) as folder:
            (folder / "x").write_text("x")
    assert main(command.format(run=run.path, root=tmp_path).split()) == 1
    assert "began with another policy" in capsys.readouterr().err
    (run.checkpoints / "step_000002" / "manifest.json").write_text("{}")
    check_same_start(run, now, "the newest that can be read")


@pytest.fixture
def cast(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the driver is made with, instead of a run: it writes a checkpoint, and is stopped."""
    seen: list[dict[str, Any]] = []

    class Told:
        def __init__(self, _: Any, **known: Any) -> None:
            seen.append(known)
            self.known = known

        async def run(self) -> Any:
            step = self.known["start"].step + 1
            state = {"version": 1, "cursor": 1, "samples": 1, "tokens": 1, "drops": {}}
            with self.known["checkpoints"].write(
                step, {"step": step, **state, **self.known["extra_state"]}
            ) as folder:
                (folder / "x").write_text("x")
            return SimpleNamespace(stopped=True)

    @asynccontextmanager
    async def launched(*_: Any, **__: Any) -> AsyncIterator[Any]:
        yield SimpleNamespace(generators=[], scorers=[], learner=None)

    monkeypatch.setattr("distrl.cli.train.Driver", Told)
    monkeypatch.setattr("distrl.cli.train.launched", launched)
    monkeypatch.setattr("distrl.cli.train.connected", lambda _: nullcontext())
    monkeypatch.setattr("distrl.cli.train._sink", lambda *_: SimpleNamespace(close=lambda: None))
    return seen


def test_a_run_resumes_only_with_what_it_began_with(
    cast: list[dict[str, Any]], tiny_policy: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(tiny_policy, policy)
    settings = recipe(tmp_path, policy)
    with RunDir(tmp_path / "r").claim(dump_yaml(settings)) as directory:
        directory.begin()
        for resume in (False, True):
            train(Options(config=settings, dry_run=False, resume=resume, fresh=False), directory)
        assert [known["start"].step for known in cast] == [0, 1]
        again = Options(config=settings, dry_run=False, resume=True, fresh=False)
        weights = policy / "model.safetensors"
        before = weights.read_bytes()
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        directory.pretrain.write_text("of then")
        texts = settings.learn.pretrain.model_copy(update={"coef": 0.1})
        mixing = settings.learn.model_copy(update={"pretrain": texts})
        with pytest.raises(RunDirError, match=r"step_000002 .* another policy than"):
            train(
                Options(
                    config=settings.model_copy(update={"learn": mixing}),
                    dry_run=False,
                    resume=True,
                    fresh=False,
                ),
                directory,
            )
        assert len(cast) == 2 and directory.pretrain.read_text() == "of then"
        weights.write_bytes(before)
        train(again, directory)
        assert [known["start"].step for known in cast] == [0, 1, 2]


def test_a_checkpoint_that_does_not_say_is_taken_as_it_is(
    cast: list[dict[str, Any]], tiny_policy: Path, tmp_path: Path
) -> None:
    settings = recipe(tmp_path, tiny_policy)
    with RunDir(tmp_path / "r").claim(dump_yaml(settings)) as directory:
        directory.begin()
        options = Options(config=settings, dry_run=False, resume=True, fresh=False)
        train(options, directory)
        checkpoints = Checkpoints(directory.checkpoints)
        state = checkpoints.at(1).state
        assert state.pop("origin")["policy"] == model_digest(tiny_policy)
        with checkpoints.write(2, state | {"step": 2}) as folder:
            (folder / "x").write_text(json.dumps({}))
        train(options, directory)
        assert [known["start"].step for known in cast] == [0, 2]
        assert "origin" in checkpoints.at(3).state
