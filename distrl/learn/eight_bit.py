"""AdamW whose moments take a byte each (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
Quantization"), by torchao: blocks of 256 numbers share a scale; small tensors stay in float32, and
so do embeddings, as in the paper (section 2.3).

Imported where it is asked for alone: torchao is an extra of this package (`eight-bit`). Its steps
are compiled, once for each shape of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
from torchao.optim.subclass_8bit import (  # pyright: ignore[reportMissingImports]
    OptimState8bit,
)

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Adam's two moments, and whether they have a sign."""


class EightBitAdamW(AdamW8bit):
    """torchao's, but with a state in float32: any number of ranks takes it up, and so does AdamW of
    32 bits, and the other way round. What is read back is rounded to 8 bits once more.

    wide: those of `params` whose moments stay in float32. Most rows of an embedding have no
    gradient in a step: the second moment of a row beside others that have one is soon rounded to 0
    while its first is not, and it would move by hundreds of learning rates.
    """

    def __init__(
        self, params: Iterable[Tensor], *, wide: Iterable[Tensor] = (), **settings: Any
    ) -> None:
        super().__init__(params, **settings)
        self._wide = {id(weight) for weight in wide}

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        return torch.zeros_like(p) if id(p) in self._wide else super()._new_buffer(p, signed)

    def state_dict(self) -> dict[str, Any]:
        whole = super().state_dict()
        whole["state"] = {
            place: {name: _widened(tensor) for name, tensor in state.items()}
            for place, state in whole["state"].items()
        }
        return whole

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name, signed in MOMENTS.items():
                narrow = self._new_buffer(cast(Tensor, parameter), signed)
                _local(narrow).copy_(_local(state[name]))
                state[name] = narrow


def _widened(tensor: Tensor) -> Tensor:
    """In float32, spread over ranks as before."""
    local = _local(tensor)
    if not isinstance(local, OptimState8bit):
        return tensor
    wide = local.dequantize()
    if not isinstance(tensor, DTensor):
        return wide
    return DTensor.from_local(
        wide,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
