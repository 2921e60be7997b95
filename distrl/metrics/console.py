"""Live progress of a stage: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from distrl.metrics.sinks import Cell, Value

logger = logging.getLogger(__name__)

RATE = "rollout/tokens_per_second"
DROPS = "driver/drops"

# What a training step shows, and what it is called on the screen.
TRAINING = {
    "reward/mean": "reward",
    "kl/ref": "KL",
    "staleness/max": "staleness",
    RATE: "tokens/s",
    DROPS: "dropped",
}


class StageProgress:
    """Shows how far a stage is; called with a step (from 1) and the step's values.

    On a terminal it is a live line. Otherwise (a log file, CI) a plain line appears at
    most every `every_s` seconds, and for the first and the last step.

    Args:
        stage: its name, as the user reads it.
        total: steps of the whole stage.
        start: steps that were done before, in a run that is resumed.
        shown: metric names and their labels; empty: every number that comes.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        start: int = 0,
        shown: Mapping[str, str] | None = None,
        every_s: float = 5.0,
        console: Console | None = None,
    ) -> None:
        self.stage, self.total = stage, total
        self._start, self._shown, self._every_s = start, shown or {}, every_s
        self._console = console or Console(file=sys.stdout)
        self._began = time.monotonic()
        self._last_line = float("-inf")
        self._live = self._open_live() if self._console.is_terminal else None

    def _open_live(self) -> Progress:
        live = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            console=self._console,
        )
        self._task = live.add_task(self.stage, total=self.total, completed=self._start, values="")
        live.start()
        return live

    def __call__(self, step: int, values: Mapping[str, Value]) -> None:
        with self._dispensable():
            self._show(step, values)

    def _show(self, step: int, values: Mapping[str, Value]) -> None:
        text = f"{self._text(values)}  {self._time_left(step)}"
        if self._live is not None:
            self._live.update(self._task, completed=step, values=text)
        elif time.monotonic() - self._last_line >= self._every_s or step >= self.total:
            self._last_line = time.monotonic()
            # `out` neither wraps nor styles: one step is one line of the log file.
            self._console.out(f"{self.stage} {step}/{self.total}  {text}", highlight=False)
            if not self._console.quiet:
                self._console.file.flush()

    def close(self) -> None:
        """Leave the last state on the screen."""
        live, self._live = self._live, None
        if live is not None:
            with self._dispensable():
                live.stop()

    @contextmanager
    def _dispensable(self) -> Iterator[None]:
        """No work ends because it cannot be shown: a log file's disk is full, a pipe's reader has
        gone. Said once; from then on what goes to standard output is dropped."""
        try:
            yield
        except (OSError, SystemExit) as error:  # rich would end the process with its reader
            self._console.quiet = True
            logger.warning("the progress of %s cannot be shown any more: %s", self.stage, error)
            if self._console.file is sys.stdout:
                with suppress(OSError):
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, sys.stdout.fileno())
                    os.close(nowhere)

    def _text(self, values: Mapping[str, Value]) -> str:
        labels = self._shown or {name: name for name in values}
        numbers = {n: v for n, v in values.items() if not isinstance(v, Sequence)}
        return "  ".join(
            f"{label} {_short(numbers[name])}" for name, label in labels.items() if name in numbers
        )

    def _time_left(self, step: int) -> str:
        done = max(step - self._start, 1)
        left = (time.monotonic() - self._began) / done * max(self.total - step, 0)
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        clock = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
        return f"{clock} left"


def _short(value: float) -> str:
    """Three significant digits, and large numbers whole: 0.123, 12.3, 1,234."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@contextmanager
def stage_progress(
    stage: str, total: int, *, console: Console | None = None
) -> Iterator[StageProgress]:
    """Progress of a stage: `with stage_progress("SFT", n) as tick: tick(step, {"loss": x})`."""
    progress = StageProgress(stage, total, console=console)
    try:
        yield progress
    finally:
        progress.close()


class ConsoleSink:
    """Shows reward, KL, staleness, tokens/s, dropped groups and the time left of a training run."""

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        every_s: float = 5.0,
        console: Console | None = None,
    ) -> None:
        self._progress = StageProgress(
            "PPO", total, start=start, shown=TRAINING, every_s=every_s, console=console
        )

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """In the last step nothing is generated any more, and its rate says nothing; nor does it
        where nothing was dropped."""
        self._progress(step, {n: v for n, v in values.items() if n not in (RATE, DROPS) or v})

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]
    ) -> None:
        """Tables do not go to the screen."""

    def close(self) -> None:
        self._progress.close()
