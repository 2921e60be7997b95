"""An exponential moving average of a policy's weights (Ouyang et al. 2022, appendix C.4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from distrl.learn.ranks import ALONE, Ranks
from distrl.learn.state import load_tensors, save_tensors


class WeightAverage:
    """average ← decay · average + (1 − decay) · weights, after each learner step."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self.decay = module, decay
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        for name, parameter in self._module.named_parameters():
            self.weights[name].lerp_(parameter, 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the module has the average's weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._module.named_parameters():
            mine = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(mine)

    def save(self, path: Path, ranks: Ranks = ALONE) -> Path:
        """Returns the file."""
        return save_tensors(self.weights, path, ranks)

    def load(self, path: Path) -> None:
        """Take up what `save` wrote. Raises StateMismatch."""
        load_tensors(self.weights, path)
