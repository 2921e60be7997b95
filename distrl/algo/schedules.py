"""How the learning rate moves over a run."""

from __future__ import annotations

import math
from typing import Literal, get_args

from distrl.algo.checks import check_choice, check_range

ScheduleKind = Literal["constant", "linear", "cosine"]

WARMUP_START = 0.1


def lr_factor(
    step: int,
    total: int,
    kind: ScheduleKind = "constant",
    warmup: int = 0,
    floor: float = 0.1,
) -> float:
    """What to multiply the peak learning rate by at ``step`` (counted from 0) of ``total``.

        warm-up    0.1 + 0.9 t/(W − 1)  for t < W: from a tenth of the peak, reached at t = W − 1
        then, with x = (t − W) / (total − W),
        constant   1                                      InstructGPT's RL
        linear     1 − x                                  Ziegler et al. 2019, Stiennon et al. 2020
        cosine     floor + (1 − floor) (1 + cos πx) / 2   InstructGPT's SFT and reward models

    Past ``total`` the factor stays where it ended. Raises ValueError on an unknown kind, a negative
    step, total below 1, warmup outside [0, total], or floor outside [0, 1].
    """
    check_choice("kind", kind, get_args(ScheduleKind))
    check_range("step", step, 0)
    check_range("total", total, 1)
    check_range("warmup", warmup, 0, total)
    check_range("floor", floor, 0, 1)
    if step < warmup - 1:
        return WARMUP_START + (1 - WARMUP_START) * step / (warmup - 1)
    progress = 1.0 if step >= total else max(step - warmup, 0) / max(total - warmup, 1)
    if kind == "linear":
        return 1 - progress
    if kind == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
