"""What `distrl train` puts together before any actor starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distrl.checkpoint import Checkpoint, RunDir
from distrl.cli.train import open_ledger
from distrl.config import Config


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
