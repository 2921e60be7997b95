"""A model spread over ranks (FSDP2): each holds a part of every weight, and has a layer whole only
while it runs it.

Zhao et al. 2023, "PyTorch FSDP". What is trained stays in float32; with another `compute` dtype
the copies that are gathered for a pass have that one, and gradients are summed in float32.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

# It fears operations in place on what a module returns; there are none here.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def shard(
    module: nn.Module, mesh: DeviceMesh, compute: torch.dtype, *, offload: bool = False
) -> None:
    """Spread `module` over `mesh`, in place and layer by layer; its forward is the only way in.

    Gradients are summed over ranks, not averaged: each rank's loss is its share of the whole.
    offload: what is not being computed with waits in the CPU's memory. A rank that is alone, and
    has all weights anyway, has them in `compute` at once, from its pass there to the end of its way
    back, and for passes without one that are made meanwhile: a layer's own gathering takes a GPU's
    host longer than the GPU takes to run the layer. What never changes and is in `compute` already
    is left as it is there.
    """
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    where = CPUOffloadPolicy() if offload else OffloadPolicy()
    at_once = mesh.size() == 1 and not offload
    if at_once and all(p.dtype == compute and not p.requires_grad for p in module.parameters()):
        module.to(mesh.device_type)
        return
    parts = [] if at_once else list(layers(module))
    for part in [*parts, module]:
        # Also the outermost is spread again after each pass: one without gradient would else leave
        # its weights whole, and out of date after the next step.
        fully_shard(
            part,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=where,
            reshard_after_forward=not at_once,
        )
        root = cast(FSDPModule, part)
        root.set_gradient_divide_factor(1.0)
        root.set_force_sum_reduction_for_comms(True)
    if at_once:
        _AsFound(module)


class _AsFound:
    """A pass that has no way back leaves weights gathered where they were so before it, as they
    are waiting for another's way back, and lets go of them otherwise."""

    def __init__(self, module: nn.Module) -> None:
        self._gathered = False
        module.register_forward_pre_hook(self._before, prepend=True)
        module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: object) -> None:
        self._gathered = not isinstance(next(module.parameters()), DTensor)

    def _after(self, module: nn.Module, args: object, output: object) -> None:
        if not (torch.is_grad_enabled() or self._gathered):
            cast(FSDPModule, module).reshard()


def checkpoint_activations(module: nn.Module) -> None:
    """Each layer keeps its input alone, and is computed again on the way back (Chen et al. 2016).
    Layers stay where they are, under their names."""
    for layer in layers(module):
        layer.forward = functools.partial(_computed_again, layer.forward)


def _computed_again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def layers(module: nn.Module) -> Iterator[nn.Module]:
    """What its model calls units that must not be split."""
    parts = list(module.modules())
    kinds = {kind for part in parts for kind in getattr(part, "_no_split_modules", None) or ()}
    return (part for part in parts if type(part).__name__ in kinds)
