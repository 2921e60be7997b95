"""A learner's state on disk: safetensors and JSON, no pickle."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class StateMismatch(ValueError):
    """A saved state does not fit the model or optimizer that should take it up."""


def save_module(module: nn.Module, path: Path) -> None:
    """All parameters and buffers of `module`, tied tensors once."""
    save_file({k: v.detach().cpu().contiguous() for k, v in _untied(module).items()}, path)


def load_module(module: nn.Module, path: Path) -> None:
    """Take up what `save_module` wrote. Raises StateMismatch."""
    saved, mine = load_file(path), _untied(module)
    if saved.keys() != mine.keys():
        raise StateMismatch(f"{path} holds other tensors: {sorted(saved.keys() ^ mine.keys())[:4]}")
    with torch.no_grad():
        for name, tensor in mine.items():
            if tensor.shape != saved[name].shape:
                raise StateMismatch(f"{path}: {name} has shape {tuple(saved[name].shape)}")
            tensor.copy_(saved[name])


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """The moments and step counts; hyperparameters come from the configuration."""
    state = optimizer.state_dict()["state"]
    save_file(
        {f"{i}.{k}": v.detach().cpu().contiguous() for i, s in state.items() for k, v in s.items()},
        path,
    )


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Take up what `save_optimizer` wrote. Raises StateMismatch."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(path).items():
        place, key = name.split(".", 1)
        state.setdefault(int(place), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    places = {place for group in groups for place in group["params"]}
    if state and state.keys() != places:
        raise StateMismatch(
            f"{path} is of an optimizer with {len(state)} tensors, not {len(places)}"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, moments in state.items():
        for key, tensor in moments.items():
            if tensor.ndim and tensor.shape != parameters[place].shape:
                raise StateMismatch(f"{path}: {place}.{key} has shape {tuple(tensor.shape)}")
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _untied(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under their first name each."""
    return dict(module.named_parameters()) | dict(module.named_buffers())
