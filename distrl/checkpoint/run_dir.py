"""A run directory: what lies where, who may write to it, and with which configuration.

    config.yaml   metrics.jsonl   tables/   ledger.sqlite   checkpoints/step_000050/
    policy/       logs/           wandb/   recording/step_000001.safetensors

One driver at a time: a lock that the kernel frees when its holder dies.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from distrl.config import Config
from distrl.disk import write_whole, writing
from distrl.errors import UserError

# What a resumed run may change: how long, where and how watched, never what is learned.
RESUMABLE = (
    "run.root",
    "run.name",
    "driver.steps",
    "driver.checkpoint_every",
    "driver.keep_checkpoints",
    "driver.max_restarts",
    "driver.ledger",
    "*.cpus",
    "*.gpus",
    "learn.ranks",
    "learn.checkpoint_activations",
    "learn.offload",
    "learn.record",
    "learn.record_mib",
    "generate.workers",
    "score.workers",
    "sync.*",
    "*timeout_s",
    "metrics.*",
    "cluster.*",
    "evaluate.*",
    "simulate.*",
)

LOCK = ".lock"
"""The file that a run's driver holds locked."""


class RunDirError(UserError):
    """The run directory cannot be used; the message says what to do."""


class RunDir:
    """The folder of one run. Reading its paths needs no lock; `claim` takes it, `begin` writes."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None
        self._config_yaml, self._fresh = "", False

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One flat JSON object a learner step."""
        return self.path / "metrics.jsonl"

    @property
    def tables(self) -> Path:
        """Tables of rollouts, one JSONL file a table."""
        return self.path / "tables"

    @property
    def ledger(self) -> Path:
        """What became of every prompt."""
        return self.path / "ledger.sqlite"

    @property
    def checkpoints(self) -> Path:
        """Committed checkpoints, a folder a step."""
        return self.path / "checkpoints"

    @property
    def policy(self) -> Path:
        """The final export, in Hugging Face format."""
        return self.path / "policy"

    @property
    def recording(self) -> Path:
        """The learner's batches, a file a step, where they are kept for a replay."""
        return self.path / "recording"

    @property
    def pretrain(self) -> Path:
        """SFT examples as token ids, for PPO-ptx."""
        return self.path / "pretrain.safetensors"

    @property
    def logs(self) -> Path:
        """Logs of the run's processes."""
        return self.path / "logs"

    @property
    def wandb(self) -> Path:
        """W&B's own files."""
        return self.path / "wandb"

    def claim(self, config_yaml: str, *, resume: bool = False, fresh: bool = False) -> RunDir:
        """Take the directory for this process; nothing that lies in it is touched before `begin`.

        `resume` goes on with a run that is there; `fresh` will delete its progress (metrics,
        tables, ledger, checkpoints, recording, exported policy). The lock is held until `close` or
        the end of the process.

        Raises RunDirError: another process has it; it has progress and neither flag was
        given; or the configuration to resume with would learn something else. Raises NotWritten
        where the disk is full or refuses.
        """
        self._check_path(resume, fresh)
        with writing("the run directory", self.path, "give the same command again"):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except FileNotFoundError:  # below /proc, say
                raise RunDirError(
                    f"no folder can be made at {self.path}; choose another run.root"
                ) from None
            self._take_lock()
            try:
                self.check(config_yaml, resume=resume, fresh=fresh)
            except BaseException:
                self.close()
                raise
        self._config_yaml, self._fresh = config_yaml, fresh
        return self

    def begin(self) -> RunDir:
        """Write `config.yaml`; where `fresh` was said, delete the progress. For when all that could
        be refused has been looked at. Raises NotWritten where the disk is full or refuses."""
        with writing("the run directory", self.path, "give the same command again"):
            if self._fresh:
                self._delete_progress()
            for folder in (self.checkpoints, self.logs, self.tables):
                folder.mkdir(exist_ok=True)
            write_whole(self.config, self._config_yaml)
        return self

    def check(self, config_yaml: str, *, resume: bool, fresh: bool) -> None:
        """Raise RunDirError where `claim` would, but for another process that has it now."""
        self._check_path(resume, fresh)
        if not fresh and self.has_progress():
            if not resume:
                raise RunDirError(
                    f"{self.path} holds a run already; go on with it by --resume, "
                    "delete its progress by --fresh, or choose another --run.name"
                )
            self._check_same_config(config_yaml)

    def _check_path(self, resume: bool, fresh: bool) -> None:
        """Raise RunDirError for flags that exclude each other, or where a file stands in the way of
        the folder."""
        if resume and fresh:
            raise RunDirError("resume and fresh exclude each other: keep the progress or not?")
        there = next(
            place for place in (self.path, *self.path.absolute().parents) if place.exists()
        )
        if not there.is_dir():
            raise RunDirError(f"{there} is no folder; choose another run.root or --run.name")

    def has_progress(self) -> bool:
        """Whether a run has left steps, checkpoints or a policy here that `begin` will keep."""
        if self._fresh:
            return False
        metrics = self.metrics.exists() and self.metrics.stat().st_size > 0
        folders = (self.checkpoints, self.policy)
        return metrics or any(f.is_dir() and any(f.iterdir()) for f in folders)

    def close(self) -> None:
        """Let another process have the directory, and remove it where nothing has begun in it. May
        be called twice."""
        if self._lock is not None:
            with suppress(OSError):  # somebody may have removed it
                if [entry.name for entry in self.path.iterdir()] == [LOCK]:
                    shutil.rmtree(self.path)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_same_config(self, config_yaml: str) -> None:
        if not self.config.exists():
            raise RunDirError(
                f"{self.path} has progress but no config.yaml to compare with; put the "
                "run's own one back, or delete the progress by --fresh"
            )
        try:
            there = flat(yaml.safe_load(self.config.read_text()))
        except (yaml.YAMLError, AttributeError, UnicodeDecodeError):
            raise RunDirError(
                f"{self.config} is damaged; put the run's own one back, delete the progress by "
                "'distrl train --fresh', or choose another --run.name"
            ) from None
        given = flat(yaml.safe_load(config_yaml))
        there = unknown_then(there, given) | there
        changed = [
            f"  {key}: {there.get(key, '(absent)')} -> {given.get(key, '(absent)')}"
            for key in sorted(there.keys() | given.keys())
            if there.get(key) != given.get(key)
            and not any(fnmatchcase(key, pattern) for pattern in RESUMABLE)
        ]
        if changed:
            raise RunDirError(
                f"{self.path} was run with another configuration (there -> given):\n"
                + "\n".join(changed)
                + "\nResume with the same values, or choose another --run.name"
            )

    def _delete_progress(self) -> None:
        for folder in (self.checkpoints, self.policy, self.tables, self.recording):
            shutil.rmtree(folder, ignore_errors=True)
        for suffix in ("", "-wal", "-shm"):
            self.ledger.with_name(self.ledger.name + suffix).unlink(missing_ok=True)
        told = (self.metrics, *self.path.glob("evaluation*.json"), self.path / "reward_vs_kl.png")
        for path in told:
            path.unlink(missing_ok=True)

    def _take_lock(self) -> None:
        path = self.path / LOCK
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode() or "a process that has just started"
            os.close(descriptor)
            raise RunDirError(
                f"{self.path} is in use by {holder}; wait for it, stop it, "
                "or choose another --run.name"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._lock = descriptor


def unknown_then(there: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of settings of `now` that `there`, which an earlier version may have written,
    does not have: what is new leaves a run as it was until it is set. All names are dotted."""
    defaults = flat(Config().model_dump(mode="json"))
    return {name: defaults[name] for name in defaults.keys() & (now.keys() - there.keys())}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted keys: {"learn": {"lr": 1}} becomes {"learn.lr": 1}."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
