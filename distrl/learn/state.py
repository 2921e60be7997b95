"""A learner's state on disk: safetensors and JSON, no pickle.

    policy.safetensors                    of a learner that is one process
    policy.00001-of-00004.safetensors     what rank 1 of 4 holds: rows of each tensor, from the row
                                          that the file's metadata names

A learner on any number of ranks takes up what one on any other number wrote: it reads, of every
file, the rows that are its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distrl.errors import UserError
from distrl.learn.ranks import ALONE, Ranks

SAME = "give the model and learn settings that the run was made with (its config.yaml)"


class StateMismatch(UserError, ValueError):
    """A saved state does not fit the model or optimizer that should take it up."""


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, ranks: Ranks = ALONE, **more: int
) -> Path:
    """This rank's part of `tensors`, and what `more` says of them. Returns the file."""
    parts = {name: _part(tensor) for name, tensor in tensors.items()}
    firsts = {name: first for name, (first, _) in parts.items() if first}
    file = _file(path, ranks)
    save_file(
        {name: rows.cpu().contiguous() for name, (_, rows) in parts.items()},
        file,
        # One entry: safetensors writes several in an order of its own, another each time.
        {"layout": json.dumps({"first_rows": firsts, **more})},
    )
    return file


def load_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fill `tensors` with what any number of ranks wrote to `path`. Raises StateMismatch."""
    with _Saved(path) as saved:
        if saved.names != tensors.keys():
            other = sorted(saved.names ^ tensors.keys())
            raise StateMismatch(f"{path} holds other tensors: {other[:4]}; {SAME}")
        for name, tensor in tensors.items():
            saved.fill(name, tensor)


def save_module(module: nn.Module, path: Path, ranks: Ranks = ALONE) -> Path:
    """All parameters and buffers of `module`, tied tensors once. Returns the file."""
    return save_tensors(_untied(module), path, ranks)


def load_module(module: nn.Module, path: Path) -> None:
    """Take up what `save_module` wrote. Raises StateMismatch."""
    load_tensors(_untied(module), path)


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path, ranks: Ranks = ALONE) -> Path:
    """The moments and step counts; hyperparameters come from the configuration. Returns the
    file."""
    state = optimizer.state_dict()["state"]
    tensors = {f"{i}.{k}": v for i, s in state.items() for k, v in s.items()}
    return save_tensors(tensors, path, ranks, weights=len(_weights(optimizer)))


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Take up what `save_optimizer` wrote. Raises StateMismatch.

    A weight that no gradient has ever reached has no moments, there and here: a vision tower's
    that text alone is read with, say.
    """
    parameters = _weights(optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    with _Saved(path) as saved:
        if (count := saved.weights) not in (None, len(parameters)):
            raise StateMismatch(
                f"{path} is of an optimizer with {count} tensors, not {len(parameters)}; {SAME}"
            )
        for name in saved.names:
            place, key = name.split(".", 1)
            like = parameters[int(place)].detach()
            tensor = torch.zeros(()) if saved.shape(name) == () else torch.zeros_like(like)
            saved.fill(name, tensor)
            state.setdefault(int(place), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": dict(sorted(state.items())), "param_groups": groups})


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


class _Saved:
    """The files of one state, open for reading; `weights`: of an optimizer, those it moves."""

    def __init__(self, path: Path) -> None:
        self._path, self._stack = path, ExitStack()
        self._files: list[tuple[Any, dict[str, int]]] = []
        self.weights: int | None = None

    def __enter__(self) -> _Saved:
        for file in _files(self._path):
            opened = self._stack.enter_context(safe_open(file, framework="pt"))
            about = opened.metadata() or {}
            # An earlier version had an entry of its own for it.
            before = {"first_rows": json.loads(about.get("first_rows", "{}"))}
            layout = json.loads(about["layout"]) if "layout" in about else before
            self._files.append((opened, layout.get("first_rows", {})))
            self.weights = layout.get("weights")
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        return {name for file, _ in self._files for name in file.keys()}  # noqa: SIM118

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        last, firsts = self._files[-1]
        rows = last.get_slice(name).get_shape()
        return (firsts.get(name, 0) + rows[0], *rows[1:]) if rows else ()

    @torch.no_grad()
    def fill(self, name: str, tensor: Tensor) -> None:
        """Copy the rows that `tensor` holds of its whole. Raises StateMismatch."""
        if self.shape(name) != tuple(tensor.shape):
            raise StateMismatch(
                f"{self._path}: {name} has shape {self.shape(name)}, not {tuple(tensor.shape)}; "
                f"{SAME}"
            )
        if not tensor.shape:
            tensor.copy_(self._files[0][0].get_tensor(name))
            return
        first, mine = _part(tensor)
        for file, firsts in self._files:
            rows, begin = file.get_slice(name), firsts.get(name, 0)
            low = max(first, begin)
            high = min(first + len(mine), begin + rows.get_shape()[0])
            if low < high:
                mine[low - first : high - first].copy_(rows[low - begin : high - begin])


def _part(tensor: Tensor) -> tuple[int, Tensor]:
    """What this rank holds of a tensor, and the row that it begins with. Ranks hold equal numbers
    of rows, the last ones fewer or none (FSDP2's split along the first dimension)."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return 0, tensor
    mesh = tensor.device_mesh
    height = -(-tensor.shape[0] // mesh.size())
    return min(mesh.get_local_rank() * height, tensor.shape[0]), tensor.to_local()


def _file(path: Path, ranks: Ranks) -> Path:
    if ranks.world == 1:
        return path
    return path.with_suffix(f".{ranks.rank:05d}-of-{ranks.world:05d}{path.suffix}")


def _files(path: Path) -> list[Path]:
    """The files that hold a state, in the order of ranks. Raises StateMismatch."""
    if path.exists():
        return [path]
    files = sorted(path.parent.glob(f"{path.stem}.*-of-*{path.suffix}"))
    world = int(files[0].suffixes[-2].split("-of-")[1]) if files else 0
    if not files or len(files) != world:
        raise StateMismatch(
            f"{path} is not there, and of {world or 'no'} ranks' files {len(files)} are; a "
            "checkpoint of several machines has to lie on storage that all of them share"
        )
    return files


def _untied(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under their first name each."""
    return dict(module.named_parameters()) | dict(module.named_buffers())
