"""What `distrl train` puts together before any actor starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrl.checkpoint import Checkpoint, Checkpoints, RunDir
from distrl.cli import main
from distrl.cli.options import Options
from distrl.cli.train import STOPPED, _Tables, open_ledger, report, train
from distrl.config import Config, dump_yaml
from distrl.driver.audit import audit
from distrl.driver.ledger_file import LedgerError, LedgerFile
from distrl.driver.state import Summary
from distrl.metrics import ListSink, rewind_run
from distrl.models.folder import META_FILE
from distrl.records import Prompt, Rollout, Sample, Score, ScoredRollout, VersionSpan
from distrl.roles import PayloadLost


def test_the_ledger_is_told_of_all_that_is_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beyond the cursor: a prompt trained out of order is not to be rolled back."""
    seen: dict[str, Any] = {}

    class File:
        run_id, fence = "r", 1

        def __init__(self, path: Path, **known: Any) -> None:
            seen.update(known)

        def attempts(self) -> dict[int, int]:
            return {}

    monkeypatch.setattr("distrl.cli.train.LedgerFile", File)
    state = {"cursor": 9, "ahead": [11, 12], "ledger": "r"}
    open_ledger(Config(), RunDir(tmp_path), Checkpoint(step=4, path=tmp_path, state=state))
    assert seen == {"step": 4, "cursor": 9, "ahead": [11, 12], "run_id": "r"}
    open_ledger(Config(), RunDir(tmp_path), None)
    assert seen == {"step": 0, "cursor": 0, "ahead": (), "run_id": None}


def test_a_checkpoint_that_was_written_without_the_ledger_is_a_hole_in_it(tmp_path: Path) -> None:
    """Also where it holds as many steps: of a stretch that was given up, and done again without."""
    directory = RunDir(tmp_path)
    newest = Checkpoint(step=4, path=tmp_path, state={"cursor": 9, "ledger": None})
    with pytest.raises(LedgerError, match="is missing, and the run goes on after step 4"):
        open_ledger(Config(), directory, newest)
    LedgerFile(directory.ledger).close()
    with pytest.raises(LedgerError, match=r"has a hole: the checkpoint of step 4.*ledger off"):
        open_ledger(Config(), directory, newest)


@pytest.mark.parametrize("refused", [False, True])
def test_rows_are_rewound_after_the_ledger(
    monkeypatch: pytest.MonkeyPatch, tiny_policy: Path, tmp_path: Path, refused: bool
) -> None:
    """One that refuses leaves them; and a run that is killed before or after breaks no promise."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "well"}\n' * 40)
    config = Config.model_validate(
        {
            "run": {"name": "r", "root": str(tmp_path)},
            "model": {"path": str(tiny_policy)},
            "sft": {"epochs": 0},
            "data": {"source": str(tmp_path / "rows.jsonl")},
            "score": {"parts": [{"name": "rule", "function": "builtins:len"}]},
            "learn": {"value": {"start": "policy"}},
        }
    )
    said: list[bool] = []

    def killed(folder: Path, step: int) -> None:
        said.append(audit(directory.ledger, directory.metrics).holds)
        rewind_run(folder, step)
        said.append(audit(directory.ledger, directory.metrics).holds)
        raise InterruptedError

    monkeypatch.setattr("distrl.cli.train.rewind_run", killed)
    with RunDir(tmp_path / "r").claim(dump_yaml(config)) as directory:
        directory.begin()
        file = LedgerFile(directory.ledger)
        file.write({"steps": [(n, 1, n - 1, n, 1, 1.0, None) for n in range(1, 6)]})
        if not refused:
            file.close()
        directory.metrics.write_text("".join(f'{{"step": {n}}}\n' for n in range(1, 6)))
        if refused:
            monkeypatch.setattr("distrl.driver.ledger_file._is_alive", lambda *_: True)
            monkeypatch.setattr("os.getpid", lambda: 1)
        with pytest.raises(LedgerError if refused else InterruptedError):
            train(Options(config=config, dry_run=False, resume=True, fresh=False), directory)
        assert said == ([] if refused else [True, True])


async def test_a_table_goes_without_a_group_that_is_lost() -> None:
    """It was trained on, and the run goes on."""
    ids = np.array([5], np.int32)
    sample = Sample(
        text="well",
        token_ids=ids,
        logprobs=np.zeros(1, np.float32),
        spans=(VersionSpan(version=0, start=0, end=1),),
        finish_reason="stop",
    )
    prompt = Prompt(index=0, epoch=0, prompt_id="p0", text="say", token_ids=ids)
    rollout = Rollout(prompt=prompt, samples=(sample,), generator="g")

    async def there() -> ScoredRollout:
        return ScoredRollout(rollout=rollout, scores=(Score(value=1.0, parts={"r": 1.0}),))

    async def gone() -> ScoredRollout:
        raise PayloadLost("the driver: a payload is lost")

    sink = ListSink()
    await _Tables(Config(), sink)(1, [gone(), there()])
    ((_, _, _, rows),) = sink.tables
    assert [row[2] for row in rows] == ["well"]


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run of four steps whose policy is written; the words that name it. Nothing may begin."""
    for what in ("prepare_stages", "train"):
        monkeypatch.setattr(f"distrl.cli.train.{what}", lambda *_, **__: pytest.fail("it began"))
    words = ["--run.root", str(tmp_path), "--run.name", "r", "--driver.steps", "4"]
    values = {"run": {"root": str(tmp_path), "name": "r"}, "driver": {"steps": 4}}
    directory = RunDir(tmp_path / "r").claim(dump_yaml(Config.model_validate(values))).begin()
    with Checkpoints(directory.checkpoints).write(4, {}) as folder:
        (folder / "x").write_text("x")
    directory.policy.mkdir()
    (directory.policy / META_FILE).write_text('{"step": 4}')
    directory.close()
    return words


def test_a_finished_run_has_nothing_to_go_on_with(
    ended: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *ended, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "all 4 steps were taken before" in said and "raise --driver.steps" in said
    for more in (["--driver.steps", "6"], ["--driver.steps", "5"]):
        with pytest.raises(pytest.fail.Exception, match="it began"):
            main(["train", *ended, "--resume", *more])


def test_a_policy_of_an_earlier_end_is_not_the_last_one(ended: list[str], tmp_path: Path) -> None:
    """The run was given more steps, and killed between its last checkpoint and its export."""
    for mark in ('{"step": 2}', "", "{}", "null"):  # or it is damaged
        (tmp_path / "r" / "policy" / META_FILE).write_text(mark)
        with pytest.raises(pytest.fail.Exception, match="it began"):
            main(["train", *ended, "--resume"])


@pytest.mark.parametrize(
    "more, trouble",
    [
        ([], "holds a run already"),
        (["--resume", "--learn.lr", "3e-5"], "learn.lr: "),
        (["--resume", "--fresh"], "exclude each other"),
    ],
)
def test_a_dry_run_says_what_the_run_directory_would(
    ended: list[str], capsys: pytest.CaptureFixture[str], more: list[str], trouble: str
) -> None:
    assert main(["train", "--dry-run", *ended, *more]) == 1
    assert trouble in capsys.readouterr().err
    assert main(["train", "--dry-run", *ended, "--resume"]) == 0
    assert main(["train", "--dry-run", *ended, "--fresh"]) == 0


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("ledger", [False, True])
def test_the_last_line_says_how_many_groups_were_dropped(
    capsys: pytest.CaptureFixture[str], stopped: bool, ledger: bool
) -> None:
    config = Config.model_validate({"driver": {"ledger": ledger}})
    counts: dict[str, int] = {"step": 4, "steps": 4, "version": 4, "samples": 8, "tokens": 64}
    for drops in ({}, {"one": 1200, "other": 34}):
        summary = Summary(**counts, stopped=stopped, drops=drops, restarts=0, seconds=1.0)
        assert report(config, summary) == (STOPPED if stopped else 0)
    without, told = capsys.readouterr().out.splitlines()
    listed = f" ('distrl audit {config.run.dir}' lists them)" * ledger
    assert "dropped" not in without and f"; 1,234 groups dropped{listed}" in told
