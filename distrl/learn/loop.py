"""One supervised loop, for SFT and for reward models alike: the loss is an argument.

For each batch: loss → backward → clip → AdamW step → report, the first two by each thread of a crew
for a share of the batch. A step whose loss or gradient is not finite changes nothing and is
counted; three in a row stop the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from distrl.algo import lr_factor
from distrl.config import RewardModelConfig, SFTConfig
from distrl.errors import UserError
from distrl.models.crew import ALONE, Crew, Gradients, hand_over

MAX_SKIPS = 3
BETAS = (0.9, 0.95)

Item = TypeVar("Item")
OnStep = Callable[[int, int, Mapping[str, float]], None]


class TrainingFailed(UserError):
    """The training cannot go on; the message holds the last loss and gradient norm."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What a loss function answers for a batch, or for a share of it.

    Attributes:
        mean: scalar tensor in the graph; what is minimised.
        count: how many items (tokens, groups) `mean` is over: its weight beside other shares', and
            in an epoch's mean.
        metrics: further finite numbers to report, means over the same items.
    """

    mean: Tensor
    count: int
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """steps: optimizer steps, skipped ones included; loss: mean over the last epoch's items."""

    steps: int
    skipped: int
    loss: float
    items: int


def train(
    module: nn.Module,
    batches_of_epoch: Callable[[int], Sequence[Sequence[Item]]],
    loss: Callable[[nn.Module, Sequence[Item]], Loss],
    settings: SFTConfig | RewardModelConfig,
    *,
    on_step: OnStep,
    on_epoch: Callable[[int], Mapping[str, float]] = lambda epoch: {},
    crew: Crew = ALONE,
) -> TrainReport:
    """Train `module` for `settings.epochs`; it is left in evaluation mode.

    The learning rate warms up over the share `settings.warmup` of all steps and falls as a cosine
    to 10 % of `settings.lr` (InstructGPT, appendix C). Dropout is off, as in the learner: what
    threads draw would depend on who comes first. `on_step(step, total, metrics)` is called after
    each step, and once more with what `on_epoch(epoch)` answers at an epoch's end; both count
    from 1. Nothing here is random: the batches and the module decide the outcome.

    Raises TrainingFailed after three non-finite steps in a row, and where there is no batch.
    """
    plan = [batches_of_epoch(epoch) for epoch in range(settings.epochs)]
    total = sum(len(batches) for batches in plan)
    if not total:
        raise TrainingFailed("there is not one batch to train on; is the training split empty?")
    optimizer = adamw(module, settings.lr, settings.weight_decay)
    warm, step, skipped, in_a_row = round(settings.warmup * total), 0, 0, 0
    seen = _Mean()
    module.eval()
    for epoch, batches in enumerate(plan):
        seen = _Mean()
        for batch in batches:
            rate = settings.lr * lr_factor(step, total, "cosine", warm)
            answer = _with_gradients(module, batch, loss, crew)
            norm = _step(module, optimizer, answer.mean, rate, settings.grad_clip)
            value = answer.mean.item()
            step += 1
            if norm is None:
                skipped, in_a_row = skipped + 1, in_a_row + 1
                _stop_after(in_a_row, step, value, rate)
            else:
                in_a_row = 0
                seen.add(value, answer.count)
            shown = {} if norm is None else {"loss": value, "grad_norm": norm, **answer.metrics}
            on_step(step, total, {**shown, "lr": rate, "skipped": skipped})
        on_step(step, total, on_epoch(epoch + 1))
    return TrainReport(steps=step, skipped=skipped, loss=seen.value, items=seen.count)


def adamw(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what is trainable, without decay for vectors (norms and biases), which have
    no scale to be held down."""
    weights = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)


def _with_gradients(
    module: nn.Module,
    batch: Sequence[Item],
    loss: Callable[[nn.Module, Sequence[Item]], Loss],
    crew: Crew,
) -> Loss:
    """The loss of a batch, its gradients left in the weights. Equal to the bit every time."""
    weights = [p for p in module.parameters() if p.requires_grad]

    def work(share: Sequence[Item]) -> tuple[Loss, Gradients]:
        gradients = Gradients(weights if crew.size > 1 else None)
        answer = loss(module, share)
        gradients.backward(answer.mean * answer.count)
        return replace(answer, mean=answer.mean.detach()), gradients

    for weight in weights:
        weight.grad = None
    shares = [share for first in range(crew.size) if (share := batch[first :: crew.size])]
    done = crew.run(work, shares)
    count = max(sum(answer.count for answer, _ in done), 1)
    hand_over([gradients for _, gradients in done], crew)
    for weight in weights:
        if weight.grad is not None:
            weight.grad /= count
    parts = [(answer, answer.count / count) for answer, _ in done]
    return Loss(
        mean=torch.stack([answer.mean * part for answer, part in parts]).sum(),
        count=sum(answer.count for answer, _ in done),
        metrics={
            name: sum(answer.metrics[name] * part for answer, part in parts)
            for name in done[0][0].metrics
        },
    )


def _step(
    module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, clip: float
) -> float | None:
    """One optimizer step; the gradient's norm before clipping, or None where it was skipped."""
    norm = float(nn.utils.clip_grad_norm_(module.parameters(), clip))
    if not (torch.isfinite(loss) and math.isfinite(norm)):
        return None
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return norm


def _stop_after(in_a_row: int, step: int, loss: float, rate: float) -> None:
    if in_a_row >= MAX_SKIPS:
        raise TrainingFailed(
            f"{in_a_row} steps in a row had a loss or gradient that is not finite (step {step}, "
            f"loss {loss}, learning rate {rate:.2e}); lower the learning rate, or look at the "
            "data near that step"
        )


class _Mean:
    """Running mean of values that stand for `count` items each."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float, count: int) -> None:
        self.total, self.count = self.total + value * count, self.count + count

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan
