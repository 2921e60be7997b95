"""What the ledger costs a run: CPU time of writing it all again, over the run's wall-clock.

    python benchmarks/ledger_cost.py RUN

The ledger of a finished run is told its own story anew, call by call through the production
`FileLedger` into a new file: the calls' time is the driver's, the writer thread's comes on top.
Threshold, set before the first run: 2 % of the wall-clock of the run's learner steps.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from common import metrics, report, total

from distrl.driver.ledger import FLUSH_S, FileLedger, Step, spans_of
from distrl.driver.ledger_file import LedgerFile, open_to_read
from distrl.records import GroupInfo, Prompt, ScoredInfo

THRESHOLD = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory with a ledger, as runs/demo")
    run = parser.parse_args().run
    story = _story(run / "ledger.sqlite")
    wall = total(metrics(run), "time/step")
    calls, everything = min((_retell(story) for _ in range(3)), key=lambda pair: pair[1])
    share = everything / wall
    report(
        f"The ledger's cost in {run.name}",
        {
            "attempts": sum(what == "issued" for _, what, _ in story),
            "CPU, writer thread included, s": f"{everything:.2f}",
            "of these in the driver's thread, s": f"{calls:.2f}",
            "the run's steps, s": f"{wall:.0f}",
            "share": f"{'ok  ' if share <= THRESHOLD else 'MISS'} {100 * share:.2f} %",
        },
        f"python benchmarks/ledger_cost.py {run}",
    )


Event = tuple[float, str, tuple[Any, ...]]
"""When (s since 1970), which of the ledger's methods, with what."""


def _story(path: Path) -> list[Event]:
    """What the driver told the ledger, and when (s since 1970), in order; of what a resume rolled
    back nothing, for it was told once more."""
    with open_to_read(path) as db:
        db.row_factory = sqlite3.Row
        samples = defaultdict(list)
        for row in db.execute("SELECT * FROM samples ORDER BY idx, attempt, sample"):
            samples[row["idx"], row["attempt"]].append(row)
        events: list[Event] = []
        for row in db.execute("SELECT * FROM attempts WHERE ended = 'trained' AND undone IS NULL"):
            events += _of_attempt(row, samples[row["idx"], row["attempt"]])
        live = "SELECT step, learned_s FROM steps WHERE undone IS NULL ORDER BY step"
        steps = list(db.execute(live))
        for step in steps:
            members = db.execute(
                "SELECT idx FROM trainings WHERE undone IS NULL AND step = ?", (step["step"],)
            )
            indices = tuple(row["idx"] for row in members)
            events.append((step["learned_s"], "trained", (step["step"], indices)))
    return sorted(events, key=lambda event: event[0])


def _of_attempt(row: sqlite3.Row, samples: list[sqlite3.Row]) -> list[Event]:
    prompt = Prompt(
        index=row["idx"], epoch=row["epoch"], prompt_id=row["prompt"], text="",
        token_ids=np.zeros(1, np.int32),
    )  # fmt: skip
    group = GroupInfo(
        index=row["idx"], prompt_id=row["prompt"], generator=row["generator"], seed=row["seed"],
        lengths=tuple(s["tokens"] for s in samples),
        spans=tuple(spans_of(s["spans"]) for s in samples),
        finish_reasons=tuple(s["finish"] for s in samples), nbytes=row["nbytes"],
        seconds=row["generate_s"],
    )  # fmt: skip
    parts = [dict(p.split("=") for p in s["parts"].split()) for s in samples]
    names = parts[0] if parts else {}
    scored = ScoredInfo(
        group=group, rewards=tuple(s["reward"] for s in samples), seconds=row["score_s"],
        scorer=row["scorer"], parts={n: tuple(float(p[n]) for p in parts) for n in names},
    )  # fmt: skip
    return [
        (row["issued_s"], "issued", (prompt,)),
        (row["generated_s"], "generated", (group,)),
        (row["scored_s"], "scored", (scored,)),
        (row["admitted_s"], "admitted", (row["idx"],)),
    ]


def _retell(story: list[Event]) -> tuple[float, float]:
    """CPU seconds in the driver's calls, and of the whole process, writing included."""
    with tempfile.TemporaryDirectory(prefix="distrl-benchmark-") as folder:
        began = time.process_time()
        ledger = FileLedger(LedgerFile(Path(folder) / "ledger.sqlite"), time.monotonic)
        calls = asyncio.run(_tell(ledger, story))
        ledger.close()
        return calls, time.process_time() - began


async def _tell(ledger: FileLedger, story: list[Event]) -> float:
    """Every call in order, with a flush each second of the story; CPU seconds in the calls."""
    calls, flushed_s = 0.0, story[0][0]
    for at, what, arguments in story:
        if at - flushed_s >= FLUSH_S:
            await ledger.flush()
            flushed_s = at
        began = time.thread_time()
        if what == "trained":
            number, indices = arguments
            step = Step(number=number, version=number - 1, version_after=number, bound=1)
            ledger.trained(step, indices, [0] * len(indices))
        else:
            getattr(ledger, what)(*arguments)
        calls += time.thread_time() - began
    return calls


if __name__ == "__main__":
    main()
