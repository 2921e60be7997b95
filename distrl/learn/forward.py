"""Forward passes: log-probabilities of responses, and their values.

Only response tokens reach the output heads: the positions that predict them are picked
out of the hidden states first, so logits are never made for prompts or padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distrl.algo import HEAD_BLOCKS, HeadBlocks, head_logprobs, token_logprobs
from distrl.learn.experience import Experience
from distrl.models.compiling import compiled
from distrl.models.heads import ScalarModel
from distrl.models.packing import token_states

KEPT_BYTES = 2**28
"""Logits of a pass up to this size, in float32, are kept."""

BLOCK_TOKENS, BLOCK_BYTES = 512, 2**30
"""Of a larger pass, those of so many tokens are made at a time; on a GPU of more, where they take
less than so much: each block adds to a gradient as large as the head."""


class PolicyModel(nn.Module):
    """A causal language model as the learner reads it.

    All that is done with its weights is done within `forward`: of a model that is spread over
    ranks (`models/sharding.py`), weights are whole only there.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._kept: Callable[..., tuple[Tensor, Tensor]] = _kept_logprobs
        self._blocks = HEAD_BLOCKS

    def compile_head(self) -> None:
        """Have what comes after the body compiled when it is first run."""
        self._kept = compiled(_compilable_logprobs)
        self._blocks = HeadBlocks(compiled(HEAD_BLOCKS.there), compiled(HEAD_BLOCKS.back))

    def forward(
        self,
        ids_BL: Tensor,
        chosen_BL: Tensor,
        tokens_N: Tensor | None,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """states_ND, logprobs_N and entropy_N (nats) at the places that `chosen_BL` marks, where
        `tokens_N` came next; both are empty without tokens. `ids_BL` right-padded."""
        states_ND = token_states(self.model.base_model, ids_BL, chosen_BL)
        if tokens_N is None:
            nothing = states_ND.new_zeros(0)
            return states_ND, nothing, nothing
        logprobs_N, entropy_N = logprobs_of(
            self.model,
            states_ND,
            tokens_N,
            temperature,
            with_entropy,
            kept=self._kept,
            blocks=self._blocks,
        )
        return states_ND, logprobs_N, entropy_N


def response_states(policy: PolicyModel, batch: Experience) -> Tensor:
    """states_ND: the policy's hidden states in which the N response tokens were chosen."""
    return policy(batch.ids_BL, _predicting(batch), None)[0]


def response_logprobs(
    policy: PolicyModel, batch: Experience, temperature: float, *, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs_BT and entropy_BT (nats) of the responses under `policy`, 0 on padding, and the
    states_ND of `response_states`.

    The distribution is that of logits / temperature, as the engine samples from it.
    """
    mask_BT = batch.mask_BT
    states_ND, logprobs_N, entropy_N = policy(
        batch.ids_BL,
        _predicting(batch),
        batch.tokens_BT[mask_BT],
        temperature,
        with_entropy,
    )
    return _spread(logprobs_N, mask_BT), _spread(entropy_N, mask_BT), states_ND


def _kept_logprobs(
    states_ND: Tensor, head: nn.Linear, tokens_N: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    logprobs_1N, entropy_1N = token_logprobs(
        head(states_ND)[None], tokens_N[None], temperature, with_entropy=with_entropy
    )
    return logprobs_1N[0], entropy_1N[0]


def _compilable_logprobs(
    states_ND: Tensor, head: nn.Linear, tokens_N: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """The same as one formula, whose passes over the logits a compiler joins both ways."""
    logits_NV = head(states_ND)
    scaled_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature
    all_NV = scaled_NV - scaled_NV.logsumexp(-1, keepdim=True)
    logprobs_N = all_NV.gather(-1, tokens_N[:, None]).squeeze(-1)
    if not with_entropy:
        return logprobs_N, torch.zeros_like(logprobs_N)
    return logprobs_N, -(all_NV.exp() * all_NV).sum(-1)


def logprobs_of(
    policy: PreTrainedModel,
    states_ND: Tensor,
    tokens_N: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    kept: Callable[..., tuple[Tensor, Tensor]] = _kept_logprobs,
    blocks: HeadBlocks = HEAD_BLOCKS,
) -> tuple[Tensor, Tensor]:
    """logprobs_N and entropy_N (nats) of the tokens that were chosen in the states.

    Few logits are kept for the way back, by `kept`; many would be the largest tensor of a step, so
    they are made in `blocks` and made anew.
    """
    head = policy.get_output_embeddings()
    assert isinstance(head, nn.Linear)  # a causal language model has one
    logits_bytes = head.weight.shape[0] * 4  # of a token
    if states_ND.shape[0] * logits_bytes > KEPT_BYTES:
        filling = BLOCK_BYTES // logits_bytes if states_ND.is_cuda else 0
        return head_logprobs(
            states_ND,
            head.weight,
            tokens_N,
            temperature,
            bias_V=head.bias,
            chunk=max(BLOCK_TOKENS, filling),
            with_entropy=with_entropy,
            blocks=blocks,
        )
    return kept(states_ND, head, tokens_N, temperature, with_entropy)


def response_values(
    critic: ScalarModel, batch: Experience, states_ND: Tensor | None = None
) -> Tensor:
    """values_BT: the critic's value of the state in which each response token was chosen.

    `states_ND` are those of `response_states`, where the critic stands on the policy's body.
    """
    if states_ND is None:
        values_N = critic(batch.ids_BL, _predicting(batch))
    else:
        values_N = critic.on(states_ND)
    return _spread(values_N, batch.mask_BT)


def _predicting(batch: Experience) -> Tensor:
    """[B, L] mask of the positions that predict response tokens, in the order of tokens."""
    places_L = torch.arange(batch.ids_BL.shape[1], device=batch.ids_BL.device)
    first_B1 = batch.prompt_lengths_B[:, None] - 1
    last_B1 = batch.lengths_B[:, None] - 1
    return (places_L >= first_B1) & (places_L < last_B1)


def _spread(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """The values of all response tokens, in order, back in their B x T places."""
    out_BT = values_N.new_zeros(mask_BT.shape)
    return out_BT.masked_scatter(mask_BT, values_N)
