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
from distrl.driver.audit import Audit, Finding, audit
from distrl.driver.reason import one_line

SHOWN = 5
"""Offenders named in a finding."""

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
    newest = Checkpoints(directory.checkpoints).newest_state() or {}
    report = audit(directory.ledger, directory.metrics, newest.get("ledger"), newest.get("step", 0))
    if options.json:
        print(json.dumps(_as_json(report), indent=1))
    else:
        show(report, Console())
    return 0 if report.holds else BROKEN


def show(report: Audit, console: Console) -> None:
    """The findings, the counts, and what was thrown away."""
    table = Table("", "promise", "seen", title="Audit")
    for finding in report.findings:
        verdict, style = ("holds", None) if finding.holds else ("BROKEN", "red")
        table.add_row(verdict, finding.promise, escape(_told(finding)), style=style)
    console.print(table)
    console.print(", ".join(f"{name}: {count:,}" for name, count in report.counts.items()))
    if not report.waste:
        console.print("nothing was thrown away")
        return
    thrown = Table("thrown away", "attempts", "tokens", "seconds")
    for why, (attempts, tokens, seconds) in report.waste.items():
        example = report.examples.get(why)
        told = why if example is None else f"{why}\n  one of them: {one_line(example)}"
        thrown.add_row(escape(told), f"{attempts:,}", f"{tokens:,}", f"{seconds:,.1f}")
    console.print(thrown)


def _told(finding: Finding) -> str:
    """What was seen, and who broke the promise."""
    if finding.holds:
        return finding.seen
    shown = list(finding.offenders[:SHOWN])
    if (more := len(finding.offenders) - SHOWN) > 0:
        shown.append(f"… and {more} more")
    return f"{finding.seen}; {len(finding.offenders)} breaches:\n" + "\n".join(shown)


def _as_json(report: Audit) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "holds": report.holds,
        "findings": [
            {"promise": f.promise, "holds": f.holds, "seen": f.seen, "offenders": f.offenders}
            for f in report.findings
        ],
        "counts": report.counts,
        "drops": report.drops,
        "retries": report.retries,
        "waste": report.waste,
        "examples": report.examples,
    }
