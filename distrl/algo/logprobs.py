"""From logits to the log-probabilities of the tokens that were sampled.

The logits are the largest tensor of a training step: 64 sequences of 512 tokens over 128k words
are 16 GiB in float32. Plain autograd would keep a log-softmax of that size beside them. Here both
directions walk over blocks of tokens, and all that is kept is one normaliser a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from distrl.algo.checks import check_axes, check_range


def token_logprobs(
    logits_BTV: Tensor,
    tokens_BT: Tensor,
    temperature: float = 1.0,
    *,
    chunk: int = 512,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """log softmax(z/τ)[token], and the entropy −Σ p log p of that same softmax.

    The temperature is the sampler's: a policy sampled at τ is the policy whose gradient is taken
    (Huang et al. 2024, "The N+ implementation details of RLHF with PPO").

    logits_BTV may be any view; tokens_BT holds ids in [0, V), in padding too. Returns logprobs_BT
    and entropy_BT (nats) in the logits' dtype, but in float32 for half-precision logits: bfloat16
    is good to 0.06 near −10, as wide as a PPO clip range. ``chunk`` is the number of tokens worked
    on at once. ``with_entropy=False`` skips that work and returns zeros without a gradient.

    Gradients can be taken once, not twice. Raises ValueError on shapes that do not fit, a
    temperature that is not positive, or a chunk below 1.
    """
    check_axes(logits_BTV=logits_BTV, tokens_BT=tokens_BT)
    check_range("chunk", chunk, 1)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    return _TokenLogprobs.apply(logits_BTV, tokens_BT.long(), temperature, chunk, with_entropy)


class _TokenLogprobs(torch.autograd.Function):
    """On scaled logits z: ∂logp/∂z_j = 1[j = token] − p_j, ∂H/∂z_j = −p_j (log p_j + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_BTV: Tensor,
        tokens_BT: Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits_BTV.dtype, torch.float32)
        logprobs_BT = logits_BTV.new_zeros(tokens_BT.shape, dtype=dtype)
        entropy_BT, normaliser_BT = torch.zeros_like(logprobs_BT), torch.zeros_like(logprobs_BT)
        for block in _blocks(tokens_BT, chunk):
            scaled = _scaled(logits_BTV[block].to(dtype), temperature)
            normaliser_BT[block] = scaled.logsumexp(-1)
            chosen = scaled.gather(-1, tokens_BT[block].unsqueeze(-1)).squeeze(-1)
            logprobs_BT[block] = chosen - normaliser_BT[block]
            if with_entropy:
                probs = (scaled - normaliser_BT[block].unsqueeze(-1)).exp_()
                entropy_BT[block] = torch.special.entr(probs).sum(-1)
        ctx.save_for_backward(logits_BTV, tokens_BT, normaliser_BT, entropy_BT)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy_BT)
        return logprobs_BT, entropy_BT

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits_BTV, tokens_BT, normaliser_BT, entropy_BT = ctx.saved_tensors
        grad_BTV = torch.empty_like(logits_BTV)
        for block in _blocks(tokens_BT, ctx.chunk):
            grad_BTV[block] = _logits_gradient(
                _scaled(logits_BTV[block].to(normaliser_BT.dtype), ctx.temperature),
                tokens_BT[block],
                normaliser_BT[block],
                entropy_BT[block],
                ctx.temperature,
                *(None if g is None else g[block] for g in grad_outputs),
            )
        return grad_BTV, None, None, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature; at 1 they are the same tensor, as a pass over them costs time."""
    return logits if temperature == 1 else logits / temperature


def _blocks(tokens_BT: Tensor, chunk: int) -> Iterator[tuple[slice, slice]]:
    """Tiles the B × T tokens with blocks of at most ``chunk``.

    Blocks and not a flattened range: logits are mostly a slice along T, which no view can flatten.
    """
    rows, columns = tokens_BT.shape
    height = max(1, min(rows, chunk))
    width = max(1, chunk // height)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, top + height), slice(left, left + width)


def head_logprobs(
    states_ND: Tensor,
    weight_VD: Tensor,
    tokens_N: Tensor,
    temperature: float = 1.0,
    *,
    bias_V: Tensor | None = None,
    chunk: int = 512,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """``token_logprobs`` of the head's logits, states · weightᵀ + bias, never all at once.

    At most ``chunk`` × V of them do, in either direction: the way back computes them anew, a third
    more arithmetic in the head for memory that does not grow with N. states_ND are the body's last
    hidden states; logits are in the states' dtype, and everything after them in float32 at least.
    Returns logprobs_N and entropy_N (nats). Raises ValueError as ``token_logprobs`` does.
    """
    check_axes(states_ND=states_ND, weight_VD=weight_VD, tokens_N=tokens_N)
    check_range("chunk", chunk, 1)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    return _HeadLogprobs.apply(
        states_ND, weight_VD, bias_V, tokens_N.long(), temperature, chunk, with_entropy
    )


class _HeadLogprobs(torch.autograd.Function):
    """``_TokenLogprobs`` behind a linear map: ∂z/∂states = weight, ∂z/∂weight = states."""

    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        tokens_N: Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(states_ND.dtype, torch.float32)
        logprobs_N = states_ND.new_zeros(tokens_N.shape, dtype=dtype)
        entropy_N, normaliser_N = torch.zeros_like(logprobs_N), torch.zeros_like(logprobs_N)
        for start in range(0, len(tokens_N), chunk):
            part = slice(start, start + chunk)
            scaled = _scaled(linear(states_ND[part], weight_VD, bias_V).to(dtype), temperature)
            normaliser_N[part] = scaled.logsumexp(-1)
            chosen = scaled.gather(-1, tokens_N[part].unsqueeze(-1)).squeeze(-1)
            logprobs_N[part] = chosen - normaliser_N[part]
            if with_entropy:
                probs = scaled.sub_(normaliser_N[part].unsqueeze(-1)).exp_()
                entropy_N[part] = torch.special.entr(probs).sum(-1)
        ctx.save_for_backward(states_ND, weight_VD, bias_V, tokens_N, normaliser_N, entropy_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        states_ND, weight_VD, bias_V, tokens_N, normaliser_N, entropy_N = ctx.saved_tensors
        grad_states_ND = torch.empty_like(states_ND)
        grad_weight_VD = torch.zeros_like(weight_VD)
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V)
        for start in range(0, len(tokens_N), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            scaled = linear(states_ND[part], weight_VD, bias_V).to(normaliser_N.dtype)
            grad = _logits_gradient(
                _scaled(scaled, ctx.temperature),
                tokens_N[part],
                normaliser_N[part],
                entropy_N[part],
                ctx.temperature,
                *(None if g is None else g[part] for g in grad_outputs),
            ).to(states_ND.dtype)
            grad_states_ND[part] = grad @ weight_VD
            grad_weight_VD.addmm_(grad.T, states_ND[part])
            if grad_bias_V is not None:
                grad_bias_V += grad.sum(0)
        return grad_states_ND, grad_weight_VD, grad_bias_V, None, None, None, None


def _logits_gradient(
    scaled: Tensor,
    tokens: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
    temperature: float,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """The gradient by the logits [..., V]; all others are [...], the last two the gradients by
    log-probabilities and by entropies. `scaled` stay as they are: they may be the logits."""
    grad = (scaled - normaliser.unsqueeze(-1)).exp_()
    slope = None
    if grad_entropy is not None:
        slope = (torch.special.entr(grad) - grad * entropy.unsqueeze(-1)).mul_(
            grad_entropy.unsqueeze(-1) / temperature
        )
    if grad_logprobs is None:
        return torch.zeros_like(grad) if slope is None else slope
    weight = grad_logprobs.unsqueeze(-1) / temperature
    grad.mul_(-weight).scatter_add_(-1, tokens.unsqueeze(-1), weight)
    return grad if slope is None else grad.add_(slope)
