"""One message for an error that names its fix; a traceback for any other."""

from __future__ import annotations

import errno

import pytest

from distrl.actors.cluster import PlacementError
from distrl.checkpoint import CheckpointError
from distrl.cli import main
from distrl.cli.main import known_errors
from distrl.disk import NotWritten
from distrl.driver.errors import Stalled
from distrl.evaluate import JudgeFailed
from distrl.learn.state import StateMismatch
from distrl.metrics import MetricsError
from distrl.roles import LearnerFailed, WorkerDied
from distrl.sync.memory import NonFiniteWeights


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(about: str, argv: list[str]) -> int:
        raise error

    monkeypatch.setattr("distrl.cli.train.run", run)


@pytest.mark.parametrize(
    "error",
    [
        PlacementError,
        CheckpointError,
        Stalled,
        LearnerFailed,
        WorkerDied,
        NotWritten,
        MetricsError,
        JudgeFailed,
        StateMismatch,
        NonFiniteWeights,
    ],
)
def test_a_known_error_is_one_message(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, error("what and why"))
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "distrl train: what and why\n"


def test_an_unknown_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_a_full_disk_is_one_message_wherever_it_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "/data/file"))
    assert main(["train"]) == 1
    said = capsys.readouterr().err
    assert "No space left on device: '/data/file'" in said
    assert "free some space" in said and "--resume" in said


def test_another_trouble_with_files_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, FileNotFoundError(errno.ENOENT, "a bug"))
    with pytest.raises(FileNotFoundError):
        main(["train"])


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["train"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_known_errors_are_ours() -> None:
    for error in known_errors():
        assert error.__module__.startswith("distrl."), error
