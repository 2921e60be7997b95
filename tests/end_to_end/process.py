"""A `distrl` command as a user runs it: a process of its own, and all that it starts."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from distrl.metrics import read_jsonl

DISTRL = Path(sys.executable).with_name("distrl")
MARK = "DISTRL_TEST_RUN"
SHARED = re.compile(r"/dev/shm/\S+")
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""When all of Ray is killed, these try for a minute to tell it so, and end then."""
NOISE = ("Traceback", "(raylet)", "Warning", "INFO", "[W")
"""What libraries say of themselves; it belongs in the logs."""
START_S = 480
"""Ray and the engines are up within this time, on a loaded machine too."""

RECIPE: dict[str, Any] = {
    "run": {"name": "run", "root": "."},
    "model": {"hidden": 64, "heads": 2, "layers": 2, "vocab": 512, "context": 128},
    "data": {"limit": 500},
    "sft": {"epochs": 1, "batch_tokens": 2048, "max_tokens": 96},
    "reward_model": {"epochs": 1, "reference_prompts": 16, "max_tokens": 96},
    "generate": {"samples_per_prompt": 2, "max_new_tokens": 100, "kv_cache_gib": 0.1},
    "learn": {"micro_tokens": 1024},
    "driver": {"steps": 6, "prompts_per_step": 4, "checkpoint_every": 1, "keep_checkpoints": 50},
    "metrics": {"table_every": 1},
}


def marked(mark: str) -> list[psutil.Process]:
    """Every living process that carries a mark, whoever its parent is now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def named(process: psutil.Process, prefixes: tuple[str, ...]) -> bool:
    with suppress(psutil.Error):
        return process.name().startswith(prefixes)
    return False


def told_of(process: psutil.Process) -> str:
    """What it is, what it does, and whose it is."""
    with suppress(psutil.Error):
        words = " ".join(" ".join(process.cmdline()).split())[:300]
        age = time.time() - process.create_time()
        return (
            f"{process.pid} ({process.status()}, {age:.0f} s old, {process.cpu_times().user:.1f} s "
            f"of them computing, parent {process.ppid()}): {words}"
        )
    return f"{process.pid}, gone by now"


def heed_ctrl_c() -> None:
    """A shell has its background jobs ignore it, and what they start inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Run:
    """One `distrl` process, all that it started, and the run directory."""

    def __init__(self, folder: Path, *words: str, **environment: str) -> None:
        self.folder = folder / "run"
        self.mark = uuid.uuid4().hex
        self.shared_memory: set[str] = set()
        self.listened: set[tuple[str, str]] = set()
        self.scratch = Path(tempfile.mkdtemp(prefix="run-"))  # short: sockets are put there
        self._output = folder / f"output-{self.mark}"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [DISTRL, *words, "--config", "recipe.yaml"],
                cwd=folder,
                env={**os.environ, "TMPDIR": str(self.scratch), **environment, MARK: self.mark},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=heed_ctrl_c,
            )
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def rows(self) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / "metrics.jsonl")

    def steps(self) -> list[int]:
        return [row["step"] for row in self.rows()]

    def family(self) -> list[psutil.Process]:
        """Every living process that carries this run's mark, whoever its parent is now."""
        return marked(self.mark)

    def wait_until(self, happened: Callable[[], Any], timeout_s: float = START_S) -> Any:
        """Wait for something while the run lives."""
        deadline = time.monotonic() + timeout_s
        while not (result := happened()):
            assert self.process.poll() is None, f"ended early:\n{self.output}"
            assert time.monotonic() < deadline, f"did not happen in time:\n{self.output}"
            time.sleep(0.5)
        return result

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: step in self.steps())

    def _watch(self) -> None:
        """Until the run has ended, what its processes have mapped, and which of them listens at
        what address. In a thread of its own: a process that is busy with its own maps keeps a
        reader waiting for seconds."""
        while self.process.poll() is None:
            for process in self.family():
                with suppress(OSError):
                    maps = Path(f"/proc/{process.pid}/maps").read_text()
                    self.shared_memory = self.shared_memory | set(SHARED.findall(maps))
                with suppress(psutil.Error):
                    at = {c.laddr.ip for c in process.net_connections("tcp") if not c.raddr}
                    self.listened = self.listened | {(process.name(), ip) for ip in at}
            time.sleep(2)  # a look takes 40 ms of a core

    def end(self, timeout_s: float = START_S) -> int:
        """Wait for the exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout_s:g} s:\n{self.output}")

    def interrupt(self, number: signal.Signals) -> None:
        """As a terminal does: the whole process group gets the signal."""
        os.killpg(self.process.pid, number)

    def assert_quiet(self) -> None:
        """Nobody but distrl has said anything on the screen."""
        for noise in NOISE:
            assert noise not in self.output, self.output

    def assert_nothing_left(self, within_s: float, but: tuple[str, ...] = ()) -> None:
        """No process but those named so, and no file in shared memory."""
        deadline = time.monotonic() + within_s
        while left := [p for p in self.family() if not named(p, but)]:
            told = "; ".join(map(told_of, left))
            assert time.monotonic() < deadline, f"left running after {within_s:g} s: {told}"
            time.sleep(0.2)
        files = [path for path in self.shared_memory if Path(path).exists()]
        assert not files, f"left in shared memory: {files}"
        if not but:  # a run that was not killed itself
            left = list(self.scratch.glob("distrl-*"))
            assert not left, f"left among temporary files: {left}"

    def kill_all(self) -> None:
        for process in self.family():
            process.kill()
        self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)
