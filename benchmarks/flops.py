"""What a PPO step has to multiply and add, and what the device can."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

DATA_SHEET = {"H100": 989e12, "H200": 989e12}
"""Dense bfloat16 of the SXM cards, from NVIDIA's data sheets; FLOP/s."""


def forward_flops(model: Any, lengths_B: Tensor, responses_B: Tensor, *, head: bool) -> float:
    """Of one pass over causal sequences, with the output head (where asked for) on responses alone:
    two a weight and token, and 2 L² a layer and channel for attention (Chowdhery et al. 2022,
    appendix B, less the half that causality leaves out)."""
    body, config = model.base_model, model.config
    weights = sum(m.weight.numel() for m in body.modules() if isinstance(m, nn.Linear))
    tokens, squares = int(lengths_B.sum()), int((lengths_B**2).sum())
    flops = 2 * weights * tokens + 2 * config.num_hidden_layers * config.hidden_size * squares
    if head:
        flops += 2 * config.hidden_size * config.vocab_size * int(responses_B.sum())
    return float(flops)


def step_flops(
    policy: Any, lengths_B: Tensor, responses_B: Tensor, *, epochs: int, minibatches: int
) -> float:
    """Of what PPO with a critic of its own, in the policy's shape, can't do without: the reference
    reads everything but last tokens, which have no successor, policy and critic all of that but the
    first minibatch, and a way there and back of three passes in every epoch."""
    with_head, without = (
        forward_flops(policy, lengths_B - 1, responses_B, head=head) for head in (True, False)
    )
    own = 1 - 1 / minibatches + 3 * epochs
    return with_head + own * (with_head + without)


def peak_flops(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """The best rate of a large matrix product, FLOP/s; on a CPU of as many threads."""
    size, before = (8192 if device.type == "cuda" else 2048), torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(threads)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        began = _now(device)
        torch.mm(a, b)
        best = min(best, _now(device) - began)
    torch.set_num_threads(before)
    return 2 * size**3 / best


def data_sheet(device: torch.device) -> float | None:
    """FLOP/s that the maker states for bfloat16, of the cards that we know."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for card, rate in DATA_SHEET.items() if card in name), None)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
