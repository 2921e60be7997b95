"""What a training stage writes down about itself."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any


def write_report(report: Any, folder: Path) -> Path:
    """Write the dataclass `report` to `folder/report.json`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    new = folder / ".report.json.new"
    new.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    os.replace(new, path)
    return path
