"""AdamW as the learner uses it: in 8 bits, and with TensorFlow's placement of epsilon too."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from distrl.config import LearnConfig


def optimizer_for(module: nn.Module, config: LearnConfig) -> torch.optim.Optimizer:
    """The optimizer of one network; its learning rate is set before each step."""
    weights = [p for p in module.parameters() if p.requires_grad]
    settings: dict[str, Any] = {
        "lr": 0.0,
        "betas": config.adam_betas,
        "eps": config.adam_eps,
        "weight_decay": config.weight_decay,
    }
    if config.adam_bits == 8:
        from distrl.learn.eight_bit import EightBitAdamW

        tables = [m.weight for m in module.modules() if isinstance(m, nn.Embedding)]
        return EightBitAdamW(weights, wide=tables, **settings)
    if config.adam_epsilon_in == "tf":
        return TFAdamW(weights, **settings)
    return torch.optim.AdamW(weights, **settings, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step. It is a tensor where a compiled step reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class TFAdamW(torch.optim.Optimizer):
    """AdamW with epsilon where TensorFlow has it (Huang et al. 2024, "The N+ implementation details
    of RLHF with PPO", detail on Adam):

        w ← w − lr √(1 − β2^t) / (1 − β1^t) · m / (√v + ε)

    torch divides by √v / √(1 − β2^t) + ε instead: at the first step the same ε bites 1/√(1 − β2)
    times (32 for β2 = 0.999) harder here.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient. There is no closure to call."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        (low, high), t = group["betas"], int(state["step"])
        state["exp_avg"].lerp_(weight.grad, 1 - low)
        state["exp_avg_sq"].mul_(high).addcmul_(weight.grad, weight.grad, value=1 - high)
        rate = group["lr"] * math.sqrt(1 - high**t) / (1 - low**t)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt() + group["eps"], value=-rate)
