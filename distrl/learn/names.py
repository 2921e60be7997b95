"""Weights under the names of checkpoints, which are those that engines know them by.

transformers holds all experts of a layer in one tensor; the checkpoints of a mixture of experts
have one for each. `save_pretrained` takes them apart, and so does whoever publishes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from distrl.models.load import ModelError
from distrl.sync.memory import Weight, whole


class CheckpointNames:
    """What becomes of a model's weights in its checkpoint; made before it gets adapters."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ModelError where a weight becomes part of another's, so that they cannot be
        published one after the other."""
        self._model = model
        blank = {name: _blank(weight) for name, weight in model.state_dict().items()}
        apart = {name: revert_weight_conversion(model, {name: blank[name]}) for name in blank}
        names = [target for parts in apart.values() for target in parts]
        if sorted(names) != sorted(revert_weight_conversion(model, blank)):
            raise ModelError(
                f"weights of a {type(model).__name__} are put together in its checkpoints, and an "
                "engine could not be told of them one at a time; choose another model"
            )
        self._apart = {name: parts for name, parts in apart.items() if [*parts] != [name]}

    def of(self, state: Mapping[str, Weight]) -> dict[str, Weight]:
        """`state`, with what becomes of each weight in its place."""
        found: dict[str, Weight] = {}
        for name, weight in state.items():
            if name not in self._apart:
                found[name] = weight
                continue
            source = _Source(self._model, name, weight)
            found |= {part: Part(part, like, source) for part, like in self._apart[name].items()}
        return found


@dataclass(frozen=True, slots=True)
class Part:
    """What a checkpoint has of a weight under a name of its own, cut out when it is asked for."""

    name: str
    like: Tensor
    source: _Source

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    def full_tensor(self) -> Tensor:
        """Of a model that is spread over ranks every one has to ask."""
        return self.source.take(self.name)


@dataclass(slots=True)
class _Source:
    """A weight that is taken apart; its parts are held until each was asked for."""

    model: PreTrainedModel
    name: str
    weight: Weight
    parts: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def take(self, name: str) -> Tensor:
        if name not in self.parts:
            self.parts = dict(revert_weight_conversion(self.model, {self.name: whole(self.weight)}))
        return self.parts.pop(name)


def _blank(weight: Tensor) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
