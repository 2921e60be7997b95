"""Causal attention of packed sequences in float32 on a CPU, by a kernel of our own.

torch's has a product for each block of each head made by MKL, whose calls cost more than the
products of short sequences: it takes 1.6 times as long over 59 tokens, twice as long over 512, 1.2
to 1.3 times over 2,048 (benchmarks/attention.py). Ours (attention.cpp) also reads tokens where they
are, so that nothing is laid out in padded rows.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-ffp-contract=fast",)
LANES = 16
"""A head's size must be a multiple of it: the numbers in the widest register."""

_kernel: Any = None

_LIBRARY = torch.library.Library("distrl", "FRAGMENT")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor starts, float scale) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "attention_back(Tensor q, Tensor k, Tensor v, Tensor starts, float scale, Tensor lse, "
    "Tensor dout) -> (Tensor, Tensor, Tensor)"
)


def attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> Tensor:
    """softmax(scale * q kᵀ) v, each token seeing those of its sequence up to itself.

    q: [N, H, d]; k, v: [N, G, d], head h of q reading head h // (H / G); d a multiple of `LANES`.
    All float32 on the CPU. starts: [B + 1] int32, as in `Packing`. Returns [N, H, d].

    Raises ValueError for tensors that the kernel is not made for; it must have been built.
    """
    return torch.ops.distrl.attention(q, k, v, starts, scale)[0]


def build() -> None:
    """Compile the kernel, in some seconds, once on a machine. Where that fails, attention stays
    torch's, and the log says so."""
    global _kernel
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError

    if _kernel is not None:
        return
    try:
        _kernel = CppCodeCache.load(SOURCE.read_text(), device_type="cpu", extra_flags=FLAGS)
    except CppCompileError as error:
        log.warning("attention is torch's own, slower one, as ours did not compile: %s", error)


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether the kernel is there, and made for such queries and values."""
    return (
        _kernel is not None
        and q.device.type == "cpu"
        and q.dtype == torch.float32
        and q.shape[-1] % LANES == 0
        and q.shape[-1] == v.shape[-1]
    )


class _Tokens(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]

    @classmethod
    def of(cls, x: Tensor) -> _Tokens:
        return cls(x.data_ptr(), x.stride(0), x.stride(1))


class _Sizes(ctypes.Structure):
    _fields_ = [
        ("starts", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("sequences", "heads", "groups", "size")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    ]


def _call(
    name: str, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, *rest: Tensor
) -> None:
    """Have the kernel fill the last of the tensors, in as many threads as torch may use here."""
    (tokens, heads, size), groups = q.shape, k.shape[1]
    fits = size % LANES == 0 and heads % groups == 0 and starts.dtype == torch.int32
    fits = fits and k.shape == v.shape == (tokens, groups, size)
    if not fits or any(x.dtype != torch.float32 for x in (q, k, v, *rest)):
        raise ValueError(
            f"attention of heads {tuple(q.shape)} on keys {tuple(k.shape)} and values "
            f"{tuple(v.shape)} in {q.dtype}, starts in {starts.dtype}: sizes must be the same and "
            f"multiples of {LANES}, heads of queries of those of keys, numbers float32 and starts "
            "int32"
        )
    sizes = _Sizes(
        starts.data_ptr(), len(starts) - 1, heads, groups, size, scale, torch.get_num_threads()
    )  # fmt: skip
    getattr(_kernel, name)(ctypes.byref(sizes), *map(_Tokens.of, (q, k, v, *rest)))


@functools.partial(_LIBRARY.impl, "attention", dispatch_key="CPU")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = map(_rows, (q, k, v))
    out, lse_NH = _like(q), q.new_empty(q.shape[:2])
    _call("attention", q, k, v, starts, scale, out, lse_NH)
    return out, lse_NH


@functools.partial(_LIBRARY.impl, "attention_back", dispatch_key="CPU")
def _backward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, lse_NH: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, dout = map(_rows, (q, k, v, dout))
    dq, dk, dv = map(_like, (q, k, v))
    _call("attention_back", q, k, v, starts, scale, lse_NH, dout, dq, dk, dv)
    return dq, dk, dv


def _rows(x: Tensor) -> Tensor:
    """With the numbers of a head side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("distrl::attention", lib=_LIBRARY)
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:2])


@torch.library.register_fake("distrl::attention_back", lib=_LIBRARY)
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[1])


def _way_back(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, starts, lse_NH = ctx.saved_tensors
    found = torch.ops.distrl.attention_back(q, k, v, starts, ctx.scale, lse_NH, dout)
    return *found, None, None


torch.library.register_autograd("distrl::attention", _way_back, setup_context=_keep, lib=_LIBRARY)
