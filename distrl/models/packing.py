"""Sequences of unequal length read without pads.

The tokens of all sequences stand one after another, so that layers compute on tokens alone; only
attention needs to know whose they are. On a GPU in half precision it is FlashAttention's
variable-length kernel (Dao 2023, "FlashAttention-2"), on a CPU where layers are compiled one of our
own (`attention.py`); elsewhere queries, keys and values are laid out in padded rows for the
attention alone, which is a small part of a pass.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from distrl.models import attention
from distrl.models.sharding import layers

log = logging.getLogger(__name__)

PACKED = "distrl_packed"
"""The name under which transformers knows our attention."""

TOLERANCE = 1e-4
"""Largest gap, relative to the largest state, between a packed and a padded pass at start."""

WIDEST = 256
"""Numbers of a head that FlashAttention's kernel takes at most."""

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
"""What a layer of Llama's kind is made of."""


class Packing(NamedTuple):
    """Where the N tokens of B sequences of at most L tokens are.

    Attributes:
        places_N: of each token in the B * L places of padded rows.
        tokens_BL: at each of those places the number of its token; pads have any.
        inside_BL: False on pads.
        starts: [B + 1] int32, the number of each sequence's first token, and N.
        read_M: numbers of the tokens whose last states are asked for, in their order.
    """

    places_N: Tensor
    tokens_BL: Tensor
    inside_BL: Tensor
    starts: Tensor
    read_M: Tensor

    @classmethod
    def of(cls, inside_BL: Tensor, lengths_B: Tensor, chosen_BL: Tensor) -> Packing:
        """For right-padded rows; `inside_BL` is True on the first `lengths_B` of each, `chosen_BL`
        on those that are asked for."""
        places_N = inside_BL.flatten().nonzero().squeeze(1)
        starts = F.pad(lengths_B.cumsum(0), (1, 0))
        offsets_L = torch.arange(inside_BL.shape[1], device=inside_BL.device)
        tokens_BL = (starts[:-1, None] + offsets_L).clamp_(max=len(places_N) - 1)
        read_M = chosen_BL[inside_BL].nonzero().squeeze(1)
        return cls(places_N, tokens_BL, inside_BL, starts.int(), read_M)


def token_states(body: nn.Module, ids_BL: Tensor, chosen_BL: Tensor) -> Tensor:
    """states_ND: the body's last hidden states at the places that `chosen_BL` marks, row by row.

    A row is read as far as its last chosen token, for no token sees those after it: so no pad may
    be chosen, and pads may hold anything. Packed where `pack` has made it so.
    """
    offsets_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    lengths_B = (chosen_BL * (offsets_L + 1)).amax(1).clamp(min=1)
    width = int(lengths_B.max())
    ids_BL, chosen_BL, offsets_L = ids_BL[:, :width], chosen_BL[:, :width], offsets_L[:width]
    if not is_packed(body):
        hidden_BLD = body(input_ids=ids_BL, use_cache=False).last_hidden_state
        return hidden_BLD[chosen_BL]
    inside_BL = offsets_L < lengths_B[:, None]
    packing = Packing.of(inside_BL, lengths_B, chosen_BL)
    hidden_D = body(
        input_ids=ids_BL[inside_BL][None],
        position_ids=offsets_L.expand_as(ids_BL)[inside_BL][None],
        # In four dimensions it counts as a finished mask, so that none is made.
        attention_mask=inside_BL[None, None],
        use_cache=False,
        packing=packing,
    ).last_hidden_state[0]
    return hidden_D if len(hidden_D) == len(packing.read_M) else hidden_D[packing.read_M]


def is_packed(body: nn.Module) -> bool:
    """Whether `pack` has made it so."""
    return cast(PreTrainedModel, body).config._attn_implementation == PACKED


def pack(model: PreTrainedModel) -> bool:
    """Let `model` read without pads from now on, through `token_states`. False, and nothing
    changed, where it is of a kind that cannot: each token must see all before it and nothing else.

    Tried on two short sequences, for a model that carries a state along, or whose attention is
    more than the usual, would else go wrong in silence.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if kinds != {"full_attention"} or any(windows):
        return False
    before = model.config._attn_implementation or "eager"
    try:
        wanted_ND = _tried(model)
        model.set_attn_implementation(PACKED)
        if not is_packed(model):  # some have an attention of their own, and keep it
            raise ValueError("it takes no other attention than its own")
        _compare(model, wanted_ND)
    except (TypeError, ValueError, RuntimeError) as error:
        log.warning("%s cannot read without pads: %s", type(model).__name__, error)
        model.set_attn_implementation(before)
        return False
    for last in list(layers(model))[-1:]:
        if {name for name, _ in last.named_children()} >= PARTS:
            last.forward = functools.partial(_last_layer, last)
            try:
                _compare(model, wanted_ND)
            except (TypeError, ValueError, RuntimeError):
                del last.forward
    return True


@torch.no_grad()
def _tried(model: PreTrainedModel) -> Tensor:
    """States of two short sequences: all of them, and then of some tokens alone."""
    body, device = model.base_model, next(model.parameters()).device
    ids_BL = torch.arange(10, device=device).view(2, 5) % model.config.get_text_config().vocab_size
    inside_BL = torch.arange(5, device=device) < torch.tensor([[3], [5]], device=device)
    some_BL = inside_BL & (ids_BL % 2 == 0)
    return torch.cat([token_states(body, ids_BL, chosen) for chosen in (inside_BL, some_BL)])


def _compare(model: PreTrainedModel, wanted_ND: Tensor) -> None:
    """Raises ValueError where the model reads otherwise than it did."""
    gap = (_tried(model) - wanted_ND).abs().max() / wanted_ND.abs().max()
    if not gap <= TOLERANCE:
        raise ValueError(f"its states are {gap:.1e} off, relative to the largest")


def _last_layer(layer: Any, hidden_states: Tensor, **rest: Any) -> Tensor:
    """The last layer, in which only tokens that are read go on after attention."""
    packing = rest.get("packing")
    if packing is None:
        return type(layer).forward(layer, hidden_states, **rest)
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **rest)
    states_1MD = (hidden_states + attended)[:, packing.read_M]
    return states_1MD + layer.mlp(layer.post_attention_layernorm(states_1MD))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    packing: Packing | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence: [1, H, N, d] in, [1, N, H, d] out."""
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **rest
        )
    if _flashes(query, value):
        return _flash(query, key, value, packing, scaling), None
    if attention.takes(query, value):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        return attention.attention(q, k, v, packing.starts, scale)[None], None
    rows = (_Lay.apply(x[0].transpose(0, 1), packing) for x in (query, key, value))
    q, k, v = (x.transpose(1, 2) for x in rows)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, **_grouped(q, k))
    return _Collect.apply(out.transpose(1, 2), packing)[None], None


def _flashes(query: Tensor, value: Tensor) -> bool:
    """Whether FlashAttention's kernel is made for such queries and values: some models' values are
    narrower (DeepSeek's, say)."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= WIDEST
        and query.shape[-1] % 8 == 0
    )


def _flash(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    longest = packing.inside_BL.shape[1]
    out = varlen_attn(
        q, k, v, packing.starts, packing.starts, longest, longest, scale=scale,
        window_size=(-1, 0), **_grouped(query, key),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[None]


def _grouped(query: Tensor, key: Tensor) -> dict[str, Any]:
    """What attention is told where several heads of [1, H, N, d] queries share one of keys. A
    compiler that leaves sizes open decides it by such a branch, and would break off at a number."""
    return {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}


class _Lay(torch.autograd.Function):
    """[N, H, d] tokens to padded rows [B, L, H, d]. What stands on pads is no matter: nothing
    that is kept looks at it, so no gradient comes from there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return _laid(x, packing)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _collected(grads[0], ctx.packing), None


class _Collect(torch.autograd.Function):
    """The way back, [B, L, H, d] to [N, H, d]; pads get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return _collected(x, packing)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rows = _laid(grads[0], ctx.packing)
        return rows.masked_fill_(~ctx.packing.inside_BL[..., None, None], 0), None


def _laid(x: Tensor, packing: Packing) -> Tensor:
    shape = packing.tokens_BL.shape
    return x.index_select(0, packing.tokens_BL.flatten()).view(*shape, *x.shape[1:])


def _collected(x: Tensor, packing: Packing) -> Tensor:
    return x.flatten(0, 1).index_select(0, packing.places_N)


AttentionInterface.register(PACKED, _attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
