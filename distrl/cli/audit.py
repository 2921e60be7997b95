"""`distrl audit RUN`: does the ledger of a run prove what the driver promises?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distrl.checkpoint import Checkpoints, RunDir
from distrl.driver.audit import Audit, as_json, audit, lines

BROKEN = 1
"""Exit status where a promise is broken, or nothing can be said."""


def run(about: str, argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="distrl audit",
        description=f"{about}. Exit status 0 only where every promise holds.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, as runs/demo")
    parser.add_argument("--json", action="store_true", help="print JSON, with every offender")
    options = parser.parse_args(argv)
    directory = RunDir(options.run)
    newest = newest_state(directory)
    report = audit(directory.ledger, directory.metrics, newest.get("ledger"))
    if options.json:
        print(json.dumps(as_json(report), indent=1))
    else:
        show(report, Console())
    return 0 if report.holds else BROKEN


def newest_state(directory: RunDir) -> dict[str, Any]:
    """What the newest whole checkpoint keeps; nothing where there is none."""
    newest = Checkpoints(directory.checkpoints).latest() if directory.checkpoints.exists() else None
    return newest.state if newest else {}


def show(report: Audit, console: Console) -> None:
    """The findings, the counts, and what was thrown away."""
    table = Table("", "promise", "seen", title="Audit")
    for verdict, promise, told in lines(report):
        table.add_row(verdict, promise, escape(told), style="red" if verdict == "BROKEN" else None)
    console.print(table)
    console.print(", ".join(f"{name}: {count:,}" for name, count in report.counts.items()))
    if not report.waste:
        console.print("nothing was thrown away")
        return
    thrown = Table("thrown away", "attempts", "tokens", "seconds")
    for why, (attempts, tokens, seconds) in report.waste.items():
        thrown.add_row(escape(why), f"{attempts:,}", f"{tokens:,}", f"{seconds:,.1f}")
    console.print(thrown)
