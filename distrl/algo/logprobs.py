"""From logits to the log-probabilities of the tokens that were sampled.

The logits are the largest tensor of a training step: 64 sequences of 512 tokens over 128k words
are 16 GiB in float32. Plain autograd would keep a log-softmax of that size beside them. Here both
directions walk over blocks of tokens, and all that is kept is one normaliser a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

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
            logprobs_BT[block], normaliser_BT[block], entropy_BT[block] = _there(
                logits_BTV[block].to(dtype), tokens_BT[block], temperature, with_entropy
            )
        ctx.save_for_backward(logits_BTV, tokens_BT, logprobs_BT, normaliser_BT, entropy_BT)
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
        logits_BTV, tokens_BT, *found = ctx.saved_tensors
        grad_BTV = torch.empty_like(logits_BTV)
        for block in _blocks(tokens_BT, ctx.chunk):
            known, slopes = _part(found, block), _part(grad_outputs, block)
            grad_BTV[block] = _back(logits_BTV[block], known, slopes, ctx.temperature)
            _at_chosen(grad_BTV[block], tokens_BT[block], known, slopes, ctx.temperature)
        return grad_BTV, None, None, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature; at 1 they are the same tensor, as a pass over them costs time."""
    return logits if temperature == 1 else logits / temperature


Found = tuple[Tensor, Tensor, Tensor]
"""log p[token], the normaliser log Σ e^z, and the entropy (0 where none is wanted), [...]."""

Slopes = tuple[Tensor | None, Tensor | None]
"""Gradients by log-probabilities and by entropies, [...]."""


def _there(logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool) -> Found:
    """From logits [..., V] in float32 at least, which stay as they are."""
    scaled = _scaled(logits, temperature)
    normaliser = scaled.logsumexp(-1)
    logprobs = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - normaliser
    if not with_entropy:
        return logprobs, normaliser, torch.zeros_like(logprobs)
    probs = (scaled - normaliser.unsqueeze(-1)).exp_()
    return logprobs, normaliser, torch.special.entr(probs).sum(-1)


def _back(logits: Tensor, found: Found, slopes: Slopes, temperature: float) -> Tensor:
    """The gradient by the logits [..., V], in their dtype, of all words but those that were chosen:
    each comes from its own logit, so that a compiler makes it in one pass."""
    (_, normaliser, entropy), (grad_logprobs, grad_entropy) = found, slopes
    scaled = _scaled(logits.to(normaliser.dtype), temperature)
    grad = (scaled - normaliser.unsqueeze(-1)).exp_()
    slope = None
    if grad_entropy is not None:
        slope = (torch.special.entr(grad) - grad * entropy.unsqueeze(-1)).mul_(
            grad_entropy.unsqueeze(-1) / temperature
        )
    if grad_logprobs is None:
        return (torch.zeros_like(grad) if slope is None else slope).to(logits.dtype)
    grad.mul_(-grad_logprobs.unsqueeze(-1) / temperature)
    return (grad if slope is None else grad.add_(slope)).to(logits.dtype)


def _at_chosen(
    grad: Tensor, tokens: Tensor, found: Found, slopes: Slopes, temperature: float
) -> None:
    """Put in what `_back` leaves out, the gradient by the logits of the words that were chosen."""
    (logprobs, _, entropy), (grad_logprobs, grad_entropy) = found, slopes
    probs, value = logprobs.exp(), torch.zeros_like(logprobs)
    if grad_logprobs is not None:
        weight = grad_logprobs / temperature
        value = weight - probs * weight
    if grad_entropy is not None:
        slope = torch.special.entr(probs) - probs * entropy
        value = value + slope * (grad_entropy / temperature)
    grad.scatter_(-1, tokens.unsqueeze(-1), value.to(grad.dtype).unsqueeze(-1))


def _part(tensors: Sequence[Tensor | None], where: Any) -> Any:
    """A block of each, as a tuple."""
    return tuple(None if tensor is None else tensor[where] for tensor in tensors)


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


class HeadBlocks(NamedTuple):
    """What is done with a block of logits, both ways: `_head_there` and `_head_back`, compiled
    perhaps. A compiler makes a pass over memory or two of each, where there are ten."""

    there: Callable[..., Found]
    back: Callable[..., Tensor]


def _head_there(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    with_entropy: bool,
) -> Found:
    logits = linear(states, weight, bias)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return _there(logits.to(dtype), tokens, temperature, with_entropy)


def _head_back(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    found: Found,
    slopes: Slopes,
    temperature: float,
) -> Tensor:
    return _back(linear(states, weight, bias), found, slopes, temperature)


HEAD_BLOCKS = HeadBlocks(_head_there, _head_back)
"""Step by step, as they are written."""


def head_logprobs(
    states_ND: Tensor,
    weight_VD: Tensor,
    tokens_N: Tensor,
    temperature: float = 1.0,
    *,
    bias_V: Tensor | None = None,
    chunk: int = 512,
    with_entropy: bool = True,
    blocks: HeadBlocks = HEAD_BLOCKS,
) -> tuple[Tensor, Tensor]:
    """``token_logprobs`` of the head's logits, states · weightᵀ + bias, never all at once.

    At most ``chunk`` × V of them do, in either direction: the way back computes them anew, a third
    more arithmetic in the head for memory that does not grow with N. states_ND are the body's last
    hidden states; logits are in the states' dtype, and everything after them in float32 at least,
    the sum of the weight's gradient over blocks too. ``blocks``: `HEAD_BLOCKS`, compiled perhaps.
    Returns logprobs_N and entropy_N (nats). Raises ValueError as ``token_logprobs`` does.
    """
    check_axes(states_ND=states_ND, weight_VD=weight_VD, tokens_N=tokens_N)
    check_range("chunk", chunk, 1)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature}")
    return _HeadLogprobs.apply(
        states_ND, weight_VD, bias_V, tokens_N.long(), temperature, chunk, with_entropy, blocks
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
        blocks: HeadBlocks,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(states_ND.dtype, torch.float32)
        logprobs_N = states_ND.new_zeros(tokens_N.shape, dtype=dtype)
        entropy_N, normaliser_N = torch.zeros_like(logprobs_N), torch.zeros_like(logprobs_N)
        for start in range(0, len(tokens_N), chunk):
            part = slice(start, start + chunk)
            logprobs_N[part], normaliser_N[part], entropy_N[part] = blocks.there(
                states_ND[part], weight_VD, bias_V, tokens_N[part], temperature, with_entropy
            )
        ctx.save_for_backward(
            states_ND, weight_VD, bias_V, tokens_N, logprobs_N, normaliser_N, entropy_N
        )
        ctx.temperature, ctx.chunk, ctx.blocks = temperature, chunk, blocks
        ctx.set_materialize_grads(False)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        states_ND, weight_VD, bias_V, tokens_N, *found = ctx.saved_tensors
        sums = found[0].dtype  # a sum over blocks in half precision would lose digits
        grad_states_ND = torch.empty_like(states_ND)
        _, learns, shifts, *_ = ctx.needs_input_grad  # beside adapters the head learns nothing
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=sums) if learns else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=sums) if shifts else None
        for start in range(0, len(tokens_N), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            known, slopes = _part(found, part), _part(grad_outputs, part)
            grad = ctx.blocks.back(
                states_ND[part], weight_VD, bias_V, known, slopes, ctx.temperature
            )
            _at_chosen(grad, tokens_N[part], known, slopes, ctx.temperature)
            grad_states_ND[part] = grad @ weight_VD
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, grad.T, states_ND[part])
            if grad_bias_V is not None:
                grad_bias_V += grad.sum(0, dtype=sums)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        if grad_bias_V is not None:
            grad_bias_V = grad_bias_V.to(bias_V.dtype)
        return grad_states_ND, grad_weight_VD, grad_bias_V, None, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in the total's dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
