"""What a training stage writes down about itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from distrl.disk import write_whole


def write_report(report: Any, folder: Path) -> None:
    """Write the dataclass `report` to `folder/report.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(report), indent=2) + "\n"
    write_whole(folder / "report.json", text)
