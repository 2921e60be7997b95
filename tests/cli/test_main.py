"""One message for an error that names its fix; a traceback for any other."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from distrl.actors.cluster import PlacementError
from distrl.checkpoint import CheckpointError
from distrl.cli import main
from distrl.cli.main import find_own_modules
from distrl.cli.options import Options
from distrl.disk import NotWritten
from distrl.driver.errors import Stalled
from distrl.evaluate import JudgeFailed
from distrl.learn.state import StateMismatch
from distrl.metrics import MetricsError
from distrl.roles import LearnerFailed, WorkerDied
from distrl.sync.memory import NonFiniteWeights


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(options: Options) -> int:
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


@pytest.mark.slow
def test_functions_in_the_working_directory_are_found(tmp_path: Path) -> None:
    """By the console script as it is installed, whose import path begins with its own folder."""
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(*, prompt, response, meta):\n    return -float(len(response))\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "score: {parts: [{name: short, function: 'my_rewards:brevity'}]}\n"
        "learn: {value: {start: policy}}\n"
    )
    command = [Path(sys.executable).with_name("distrl"), "train", "--dry-run"]
    ended = subprocess.run(
        [*command, "--config", "mine.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "slots (groups under way, at most)" in ended.stdout


def test_the_import_path_is_as_under_python_m(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for there, expected in {
        ("/bin", "/lib"): [str(tmp_path), "/bin", "/lib"],
        ("/lib", str(tmp_path)): ["/lib", str(tmp_path)],
        ("", "/lib"): ["", "/lib"],
    }.items():
        monkeypatch.setattr(sys, "path", list(there))
        find_own_modules()
        assert sys.path == expected
    monkeypatch.setattr(sys, "path", ["/lib"])
    monkeypatch.setattr(sys, "flags", SimpleNamespace(safe_path=True))
    find_own_modules()
    assert sys.path == ["/lib"]


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["train"]) == 130
    assert "interrupted" in capsys.readouterr().err


QUICK = """
import sys
from distrl.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as ended:
    status = ended.code
heavy = {"torch", "transformers", "ray", "vllm", "matplotlib"} & set(sys.modules)
sys.exit(f"for nothing: {heavy}" if heavy else status)
"""


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("demo --help", 0),
        ("train --help", 0),
        ("sft --learn.lrr 1", 2),
        ("reward-model --config nowhere.yaml", 2),
        ("evaluate --generate.temperature 0", 2),
        ("replay --help", 0),
        ("replay nowhere", 2),
        ("audit nowhere", 1),
        ("simulate --help", 0),
    ],
)
def test_what_is_wrong_with_the_words_is_said_at_once(words: str, status: int) -> None:
    """Not after the ten seconds in which torch and transformers are imported."""
    ended = subprocess.run(
        [sys.executable, "-c", QUICK, *words.split()], capture_output=True, text=True
    )
    assert ended.returncode == status, ended.stderr
