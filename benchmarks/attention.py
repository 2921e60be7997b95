"""Seconds of torch's attention over those of our kernel, there and back, one thread each, in turns.

    python benchmarks/attention.py [--tokens 2048] [--rounds 15]

Sequences of one length fill `--tokens`, in float32 on a CPU; torch's gets them in padded rows that
need no pads, so what laying them out would cost is not counted. Ours should never be the slower.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from common import middle, report
from torch import Tensor
from torch.nn import functional as F

from distrl.models import attention

LENGTHS = (32, 59, 128, 512, 2048)
HEADS = {"8 heads of 32": (8, 8, 32), "9 heads of 64 on 3 of keys": (9, 3, 64)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    attention.build()
    report(
        "attention of packed rows, torch's time over ours",
        {
            f"{name}, {length} tokens each": _ratio(options, length, *heads)
            for name, heads in HEADS.items()
            for length in LENGTHS
        },
        f"python benchmarks/attention.py --tokens {options.tokens} --rounds {options.rounds}",
    )


def _ratio(options: argparse.Namespace, length: int, heads: int, groups: int, size: int) -> str:
    rows = max(1, options.tokens // length)
    starts = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    packed = [torch.randn(rows * length, n, size).requires_grad_() for n in (heads, groups, groups)]
    padded = [
        x.detach().view(rows, length, -1, size).transpose(1, 2).requires_grad_() for x in packed
    ]
    grad = torch.randn(rows * length, heads, size)

    def ours() -> Tensor:
        return attention.attention(packed[0], packed[1], packed[2], starts, size**-0.5)

    def theirs() -> Tensor:
        q, k, v = padded
        grouped = heads != groups
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    def seconds(way: Callable[[], Tensor], inputs: list[Tensor], back: Tensor) -> float:
        began = time.perf_counter()
        torch.autograd.grad(way(), inputs, back)
        return time.perf_counter() - began

    rows_grad = grad.view(rows, length, heads, size).transpose(1, 2)
    ratios = [
        seconds(theirs, padded, rows_grad) / seconds(ours, packed, grad)
        for _ in range(options.rounds + 3)
    ][3:]
    return middle(ratios)


if __name__ == "__main__":
    main()
