"""Refusals that every function of this room shares."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def check_axes(**tensors: Tensor) -> None:
    """Reads each tensor's axes off its name: ``rewards_BT`` has axes B and T.

    Raises ValueError when a tensor has another number of axes, or when one letter stands for two
    sizes; the message names the tensors and their shapes.
    """
    seen: dict[str, str] = {}
    for name, tensor in tensors.items():
        axes = name.rsplit("_", 1)[-1]
        if tensor.ndim != len(axes):
            raise ValueError(f"{name} needs the {len(axes)} axes {axes}, got {_shape(tensor)}")
        for axis, size in zip(axes, tensor.shape, strict=True):
            owner = seen.setdefault(axis, name)
            if tensors[owner].shape[owner.rsplit("_", 1)[-1].index(axis)] != size:
                raise ValueError(
                    f"{name} {_shape(tensor)} and {owner} {_shape(tensors[owner])} "
                    f"differ in axis {axis}"
                )


def check_same_shape(**tensors: Tensor) -> None:
    """Raises ValueError, naming both shapes, unless all tensors are shaped like the first."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != reference.shape:
            raise ValueError(
                f"{name} {_shape(tensor)} must be shaped like {first} {_shape(reference)}"
            )


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError, listing the choices, unless ``value`` is one of them."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raises ValueError unless low <= value <= high; NaN is refused too."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}]; got {value}")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
