"""One message for an error that names its fix; a traceback for any other."""

from __future__ import annotations

import pytest

from distrl.actors.cluster import PlacementError
from distrl.checkpoint import CheckpointError
from distrl.cli import main
from distrl.cli.main import known_errors
from distrl.driver.errors import Stalled
from distrl.roles import LearnerFailed, WorkerDied


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(about: str, argv: list[str]) -> int:
        raise error

    monkeypatch.setattr("distrl.cli.train.run", run)


@pytest.mark.parametrize(
    "error", [PlacementError, CheckpointError, Stalled, LearnerFailed, WorkerDied]
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


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["train"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_known_errors_are_ours() -> None:
    for error in known_errors():
        assert error.__module__.startswith("distrl."), error
