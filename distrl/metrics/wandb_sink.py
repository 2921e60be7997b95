"""Weights & Biases, kept at arm's length: a training run never waits for it or dies of it.

Everything of W&B happens in one daemon thread behind a bounded queue. A full queue drops
rows and counts them; the first error is reported once and the sink is null from then
on. `metrics.jsonl` has every row in any case.
"""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import queue
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import psutil

from distrl.metrics.sinks import Cell, Value

logger = logging.getLogger(__name__)

# Whole words only: `max_new_tokens` is no secret, `hub_token` is.
_SECRET = re.compile(r"(^|_)(api_?key|key|token|secret|password|credentials?)$", re.IGNORECASE)


def new_run_id() -> str:
    """A fresh W&B run id. Keep it in the checkpoint, so that a resumed run goes on as one."""
    return secrets.token_hex(4)


PICTURE_EVERY = 10
"""Steps between pictures of off-policyness by age."""


class WandbSink:
    """Logs to the W&B run `run_id`, which is created or taken up again.

    The x-axis is `learner_step`, because W&B's own step refuses to go back after a
    resume. Files lie in `<run_dir>/wandb`. Without an API key the run is offline
    (`wandb sync` uploads it later); WANDB_MODE is respected.

    Args:
        config: what the run was started with; values under names like `api_key` or
            `token` are left out.
        queue_rows: rows that may wait before new ones are dropped.
        close_timeout_s: the most that `close` waits for rows to be written out, and for a server
            that does not answer.
        start_timeout_s: the most that it waits for what is this machine's alone: W&B's import, and
            all of its start where it is offline. On a busy machine that outlasts the other, and a
            short run's rows were lost.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str,
        name: str,
        config: Mapping[str, Any],
        run_id: str,
        queue_rows: int = 1000,
        close_timeout_s: float = 5.0,
        start_timeout_s: float = 30.0,
    ) -> None:
        self.run_id = run_id
        self.dropped = 0
        self.failed = False
        self._close_timeout_s, self._start_timeout_s = close_timeout_s, start_timeout_s
        self._closed = False
        self._there = threading.Event()
        self._queue: queue.Queue[Callable[[Any, Any], None] | None] = queue.Queue(queue_rows)
        self._options = {
            "dir": str(run_dir),
            "project": project,
            "name": name,
            "config": without_secrets(config),
            "id": run_id,
            "resume": "allow",
            "mode": _mode(),
        }
        run_dir.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        row = dict(values)
        self._put(lambda wandb, run: run.log(_row(wandb, step, row) | _by_age(wandb, step, row)))

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]
    ) -> None:
        heads, data = list(columns), [list(row) for row in rows]

        def send(wandb: Any, run: Any) -> None:
            run.log({name: wandb.Table(columns=heads, data=data), "learner_step": step})

        self._put(send)

    def close(self) -> None:
        """Wait for the rows to be written out; how long at most, the class says."""
        if self._closed:
            return
        self._closed = True
        self._there.wait(self._start_timeout_s)
        deadline = time.monotonic() + self._close_timeout_s
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=self._close_timeout_s)
            except queue.Full:
                self._warn("did not take its last rows in time")
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"did not finish within {self._close_timeout_s:g} s")
            _kill_service()
        if self.dropped:
            logger.warning("W&B was too slow for %d rows; metrics.jsonl has them", self.dropped)

    def _put(self, send: Callable[[Any, Any], None]) -> None:
        if self.failed or self._closed:
            return
        try:
            self._queue.put_nowait(send)
        except queue.Full:
            self.dropped += 1

    def _work(self) -> None:
        # W&B raises errors of many kinds, some from libraries below it, and none of them
        # may reach the run: this is the one place that isolates them, so it catches all.
        try:
            self._run()
        except Exception as error:
            self._warn(f"failed with {type(error).__name__}: {error}")
        finally:
            self._there.set()

    def _run(self) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            init_timeout=30,
            # W&B waits for its uploads, in an exit hook too; without a bound, for ever.
            finish_timeout=0.8 * self._close_timeout_s,
        )
        wandb.setup(settings)  # or its login speaks before it knows that it should be silent
        if self._options["mode"] == "online":  # from here on it waits for its server
            self._there.set()
        run = wandb.init(settings=settings, **self._options)
        self._there.set()
        run.define_metric("learner_step")
        run.define_metric("*", step_metric="learner_step")
        while (send := self._queue.get()) is not None:
            send(wandb, run)
        run.finish()

    def _warn(self, trouble: str) -> None:
        if not self.failed:
            logger.warning(
                "W&B %s; the run goes on without it, and metrics.jsonl has every row", trouble
            )
        self.failed = True


def _kill_service() -> None:
    """End W&B's own child process, for which its exit hook would else wait without bound."""
    services = [p for p in psutil.Process().children() if _name(p).startswith("wandb-core")]
    for service in services:
        with contextlib.suppress(psutil.NoSuchProcess):
            service.kill()
    if services:
        # It cannot say goodbye to a dead process, and would end this one with its exit status.
        with contextlib.suppress(OSError, SystemExit):
            sys.modules["wandb"].teardown()


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with every value under a name like `token` or `api_key` replaced by "***"."""
    return {
        name: (
            without_secrets(value)
            if isinstance(value, Mapping)
            else "***"
            if _SECRET.search(name) and value
            else value
        )
        for name, value in config.items()
    }


def _row(wandb: Any, step: int, values: Mapping[str, Value]) -> dict[str, Any]:
    row: dict[str, Any] = {"learner_step": step}
    for name, value in values.items():
        if isinstance(value, Sequence):  # counts by bin: 0..1, 1..2, …
            edges = list(range(len(value) + 1))
            row[name] = wandb.Histogram(np_histogram=(list(value), edges))
        else:
            row[name] = value
    return row


def _by_age(wandb: Any, step: int, values: Mapping[str, Value]) -> dict[str, Any]:
    """Every few steps a picture: how far each age of tokens is from the learner's policy."""
    lags = sorted(int(n.rpartition("lag")[2]) for n in values if n.startswith("offpolicy/kl/"))
    if step % PICTURE_EVERY or not lags:
        return {}
    names = ("kl", "ess", "tokens")
    data = [[lag, *(values[f"offpolicy/{name}/lag{lag}"] for name in names)] for lag in lags]
    table = wandb.Table(columns=["age", *names], data=data)
    title = "KL(behaviour || proximal) by age of tokens"
    return {"offpolicy/by_age": wandb.plot.line(table, "age", "kl", title=title)}


def _mode() -> str:
    """WANDB_MODE where it is set; else online with a key and offline without."""
    return os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = os.environ.get("NETRC") or str(Path.home() / ".netrc")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
