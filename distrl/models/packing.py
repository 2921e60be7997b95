"""Sequences of unequal length read without pads.

The tokens of all sequences stand one after another, so that layers compute on tokens alone; only
attention needs to know whose they are. On a GPU in half precision it is FlashAttention's
variable-length kernel (Dao 2023, "FlashAttention-2"), on a CPU where layers are compiled one of our
own (`attention.py`); elsewhere queries, keys and values are laid out in padded rows for the
attention alone, which is a small part of a pass.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from distrl.models import attention

log = logging.getLogger(__name__)

PACKED = "distrl_packed"
"""The name under which transformers knows our attention."""

TOLERANCE = 1e-4
"""Largest gap, relative to the largest state, between a packed and a padded pass at start."""


class Packing(NamedTuple):
    """Where the N tokens of B sequences of at most L tokens are.

    Attributes:
        places_N: of each token in the B * L places of padded rows.
        tokens_BL: at each of those places the number of its token; pads have any.
        inside_BL: False on pads.
        starts: [B + 1] int32, the number of each sequence's first token, and N.
    """

    places_N: Tensor
    tokens_BL: Tensor
    inside_BL: Tensor
    starts: Tensor

    @classmethod
    def of(cls, inside_BL: Tensor, lengths_B: Tensor) -> Packing:
        """For right-padded rows; `inside_BL` is True on the first `lengths_B` of each."""
        places_N = inside_BL.flatten().nonzero().squeeze(1)
        starts = F.pad(lengths_B.cumsum(0), (1, 0))
        offsets_L = torch.arange(inside_BL.shape[1], device=inside_BL.device)
        tokens_BL = (starts[:-1, None] + offsets_L).clamp_(max=len(places_N) - 1)
        return cls(places_N, tokens_BL, inside_BL, starts.int())


def token_states(body: nn.Module, ids_BL: Tensor, chosen_BL: Tensor) -> Tensor:
    """states_ND: the body's last hidden states at the places that `chosen_BL` marks, row by row.

    A row is read as far as its last chosen token, for no token sees those after it: so no pad may
    be chosen, and pads may hold anything. Packed where `pack` has made it so.
    """
    offsets_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    lengths_B = (chosen_BL * (offsets_L + 1)).amax(1).clamp(min=1)
    width = int(lengths_B.max())
    ids_BL, chosen_BL, offsets_L = ids_BL[:, :width], chosen_BL[:, :width], offsets_L[:width]
    if cast(PreTrainedModel, body).config._attn_implementation != PACKED:
        hidden_BLD = body(input_ids=ids_BL, use_cache=False).last_hidden_state
        return hidden_BLD[chosen_BL]
    inside_BL = offsets_L < lengths_B[:, None]
    hidden_1MD = body(
        input_ids=ids_BL[inside_BL][None],
        position_ids=offsets_L.expand_as(ids_BL)[inside_BL][None],
        # In four dimensions it counts as a finished mask, so that none is made.
        attention_mask=inside_BL[None, None],
        use_cache=False,
        packing=Packing.of(inside_BL, lengths_B),
    ).last_hidden_state
    return hidden_1MD[0][chosen_BL[inside_BL]]


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
    body, before = model.base_model, model.config._attn_implementation or "eager"
    device = next(model.parameters()).device
    ids_BL = torch.arange(10, device=device).view(2, 5) % config.vocab_size
    inside_BL = torch.arange(5, device=device) < torch.tensor([[3], [5]], device=device)
    try:
        with torch.no_grad():
            padded_ND = token_states(body, ids_BL, inside_BL)
            model.set_attn_implementation(PACKED)
            packed_ND = token_states(body, ids_BL, inside_BL)
        gap = (packed_ND - padded_ND).abs().max() / padded_ND.abs().max()
        if gap <= TOLERANCE:
            return True
        log.warning("%s reads %.1e off without pads; it gets them", type(model).__name__, gap)
    except (TypeError, ValueError, RuntimeError) as error:
        log.warning("%s cannot read without pads (%s)", type(model).__name__, error)
    model.set_attn_implementation(before)
    return False


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
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _flash(query, key, value, packing, scaling), None
    if attention.takes(query):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        return attention.attention(q, k, v, packing.starts, scale)[None], None
    rows = (_Lay.apply(x[0].transpose(0, 1), packing) for x in (query, key, value))
    q, k, v = (x.transpose(1, 2) for x in rows)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    return _Collect.apply(out.transpose(1, 2), packing)[None], None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    longest = packing.inside_BL.shape[1]
    out = varlen_attn(
        q, k, v, packing.starts, packing.starts, longest, longest, scale=scale,
        window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[None]


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
