"""Low-rank adapters (Hu et al. 2021) on a policy: trained instead of its weights, published merged.

The adapters are injected into the model itself, so that whoever runs it need not know. What learns
is `Adapter`, a module that holds their weights and nothing else; the model without them is the
reference, at no memory of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distrl.config import LoRAConfig
from distrl.models.load import ModelError

NAME = "default"


class Adapter(nn.Module):
    """The adapters' weights, by their names in the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        # A dot would end a name within a module.
        self.weights = nn.ParameterDict({n.replace(".", "/"): p for n, p in trained.items()})


def add_adapter(model: PreTrainedModel, config: LoRAConfig, seed: int) -> Adapter:
    """Freeze `model` and put adapters beside the layers that `config.targets` names; they add
    nothing until they are trained. Raises ModelError where a target names no layer."""
    from peft import LoraConfig, inject_adapter_in_model

    _check_targets(model, config)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=list(config.targets),
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model, adapter_name=NAME)
    return Adapter(model)


def check_targets(folder: Path, config: LoRAConfig) -> None:
    """ModelError where a target names no layer of the policy in `folder`; no weight is read."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    _check_targets(model, config)


def _check_targets(model: PreTrainedModel, config: LoRAConfig) -> None:
    """The output head is none of the layers: the learner reads it by itself."""
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ModelError(
                "learn.lora.targets: no layer of the policy that can have an adapter is called "
                f"{target!r}; it has {', '.join(kinds) or 'none (torch.nn.Linear, but no head)'}"
            )


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Within it the model is as it was before it got adapters."""
    layers = list(_layers(model))
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@dataclass(frozen=True, slots=True)
class Merged:
    """A weight and the product of its adapter, added up when somebody asks for the sum."""

    weight: Tensor
    layer: Any

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @torch.no_grad()
    def full_tensor(self) -> Tensor:
        """The sum, whole: of a model that is spread over ranks every one has to ask."""
        found = self.weight + self.layer.get_delta_weight(NAME).to(self.dtype)
        return found.full_tensor() if isinstance(found, DTensor) else found


def merged_tensors(model: PreTrainedModel) -> dict[str, Tensor | Merged]:
    """The model's state under the names it had before it got adapters, their product to be added
    one weight at a time.

    The model itself is left alone: merging in place and taking it out again would wear its weights
    down, a rounding at a time.
    """
    layers = {f"{name}.weight": layer for name, layer in _named_layers(model)}
    merged: dict[str, Tensor | Merged] = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        merged[plain] = Merged(tensor, layers[plain]) if plain in layers else tensor
    return merged


def _named_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _layers(model: nn.Module) -> Iterator[Any]:
    return (layer for _, layer in _named_layers(model))
