"""What a learner was given, step by step, and what became of its weights: for a replay.

    recording/step_000007.safetensors    the batch as tensors; its metadata has the digest of
                                         policy and critic after that step

A learner's step depends on its state and its batch alone, so the batches and the state at the
start give back every later state, on a CPU to the bit.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from distrl.errors import UserError
from distrl.learn.experience import Experience

log = logging.getLogger(__name__)

SMALL = 20_000_000
"""Parameters of a policy up to which recording is on by itself."""

_STEP = re.compile(r"step_(\d{6,})\.safetensors")


class BadRecording(UserError):
    """A recording is missing or cannot be read; the message says what and why."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One step: its number, how many the run was to have, what the learner was given (tokens of
    versions before `oldest` were left out of the gradient), and the weights' digest after it."""

    step: int
    total_steps: int
    batch: Experience
    oldest: int
    digest: str


class Recorder:
    """Keeps steps in `folder` until they fill `max_bytes`; None, or not `on`: keeps nothing."""

    def __init__(self, folder: Path | None, max_bytes: int, *, on: bool = True) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._on = on and folder is not None
        self._bytes = 0
        if folder is not None and self._on:
            folder.mkdir(parents=True, exist_ok=True)
            self._bytes = sum(path.stat().st_size for path in folder.iterdir())

    def keep(
        self, step: int, total_steps: int, batch: Experience, oldest: int, *modules: nn.Module
    ) -> None:
        """Record a step after it was taken. A full recording stays as it is."""
        if self._folder is None or not self._on:
            return
        nbytes = sum(tensor.nbytes for tensor in vars(batch).values())
        if self._bytes + nbytes > self._max_bytes:
            log.warning("recording ends before step %d: learn.record_mib is used up", step)
            self._on = False
            return
        path = _path(self._folder, step)
        meta = {
            "step": str(step),
            "total_steps": str(total_steps),
            "oldest": str(oldest),
            "digest": digest(*modules),
        }
        try:
            self._bytes += _write(path, batch, meta)
        except (OSError, SafetensorError) as error:  # a full disk, say: the run is worth more
            log.warning("recording ends before step %d: %s", step, error)
            self._on = False

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`, which are taken anew, whether or not these are recorded.
        A recording that ended before `step` stays as it is: what comes would have a gap before it.
        """
        if self._folder is None or not self._folder.is_dir():
            return
        there = 0
        for number, path in _steps(self._folder):
            if number > step:
                self._bytes -= path.stat().st_size
                path.unlink()
            else:
                there += 1
        if self._on and there < step:
            log.warning("recording ended at step %d, so it does not go on from %d", there, step)
            self._on = False


def recorded(folder: Path) -> Iterator[Recorded]:
    """The steps of a recording from 1 on, in order. Raises BadRecording at a gap."""
    steps = dict(_steps(folder)) if folder.is_dir() else {}
    if not steps:
        raise BadRecording(
            f"{folder} has no recorded step; runs record themselves where the policy is small "
            "(up to 20 M parameters) or learn.record=true"
        )
    for step in range(1, max(steps) + 1):
        if step not in steps:
            raise BadRecording(f"{folder} has no step {step}, though there are later ones")
        yield _load(steps[step], step)


def length(folder: Path) -> int:
    """The last recorded step; 0 where there is none."""
    return max((step for step, _ in _steps(folder)), default=0) if folder.is_dir() else 0


def digest(*modules: nn.Module) -> str:
    """SHA-256 of all weights, in the modules' own order."""
    whole = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            whole.update(name.encode())
            flat = tensor.detach().cpu().reshape(-1).contiguous()
            whole.update(flat.view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _write(path: Path, batch: Experience, meta: dict[str, str]) -> int:
    """Write a step whole or not at all; its bytes."""
    temporary = path.with_suffix(".tmp")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in vars(batch).items()}
    save_file(tensors, temporary, meta)
    temporary.replace(path)
    return path.stat().st_size


def _load(path: Path, step: int) -> Recorded:
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            batch = Experience(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            return Recorded(
                step=int(meta["step"]),
                total_steps=int(meta["total_steps"]),
                batch=batch,
                oldest=int(meta["oldest"]),
                digest=meta["digest"],
            )
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise BadRecording(f"{path} of step {step} cannot be read: {error}") from None


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.safetensors"


def _steps(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in sorted(folder.iterdir()):
        if match := _STEP.fullmatch(path.name):
            yield int(match[1]), path
