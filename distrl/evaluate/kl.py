"""KL of a policy to its reference on the policy's own samples, from the two checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrl.algo import kl_estimate, token_logprobs
from distrl.data.batching import pad_right, token_budget_batches
from distrl.evaluate.stats import Floats
from distrl.models import best_device, load_policy
from distrl.records import Rollout

Row = tuple[np.ndarray, int]


def response_kl(
    rollouts: Sequence[Rollout],
    policy: Path,
    reference: Path,
    *,
    temperature: float,
    batch_tokens: int,
) -> Floats:
    """kl_PN: sum over a response's tokens of log pi - log pi_ref (k1, nats).

    One sample's value may be negative; the mean over samples of pi is an unbiased estimate
    of KL(pi || ref). Both distributions are those at the sampling temperature. Computed in
    float32 by both models, so that no engine's rounding is in it. Every rollout must have
    the same number of samples; a forward pass has at most `batch_tokens` padded tokens, or one
    sequence.
    """
    rows = [
        (np.concatenate([r.prompt.token_ids, s.token_ids]), len(r.prompt.token_ids))
        for r in rollouts
        for s in r.samples
    ]
    lengths = [len(ids) for ids, _ in rows]
    batches = token_budget_batches(lengths, max(batch_tokens, *lengths), seed=0)
    policies = _load(policy), _load(reference)
    kl_R = np.empty(len(rows))
    for batch in batches:
        kl_R[batch] = _batch_kl([rows[i] for i in batch], *policies, temperature)
    return kl_R.reshape(len(rollouts), -1)


def _load(folder: Path) -> Any:
    model: torch.nn.Module = load_policy(folder)
    return torch.nn.Module.to(model, best_device())


@torch.no_grad()
def _batch_kl(rows: Sequence[Row], policy: Any, reference: Any, temperature: float) -> Floats:
    """kl_B of rows of (prompt + response, length of the prompt)."""
    ids, lengths_B = pad_right([ids for ids, _ in rows], pad=0)
    ids_BL = torch.from_numpy(ids).to(policy.device)
    # The position before a token predicts it, so the masked ones lie one to the left.
    place_L = np.arange(ids.shape[1] - 1)
    prompts_B1 = np.array([[prompt] for _, prompt in rows])
    mask_BL = (place_L >= prompts_B1 - 1) & (place_L < lengths_B[:, None] - 1)
    mask = torch.from_numpy(mask_BL).to(ids_BL.device)
    logprobs_R = _response_logprobs(policy, ids_BL, mask, temperature)
    ref_logprobs_R = _response_logprobs(reference, ids_BL, mask, temperature)
    kl_R = kl_estimate(logprobs_R, ref_logprobs_R, "k1").double().cpu().numpy()
    return np.add.reduceat(kl_R, np.cumsum([0, *mask_BL.sum(1)[:-1]]))


def _response_logprobs(policy: Any, ids_BL: Tensor, mask_BL: Tensor, temperature: float) -> Tensor:
    """logprobs_R of all response tokens of a batch, row by row.

    Logits are made for those alone: over the whole batch they would be its largest tensor.
    """
    hidden_BLD = policy.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
    logits_1RV = policy.get_output_embeddings()(hidden_BLD[:, :-1][mask_BL])[None]
    tokens_1R = ids_BL[:, 1:][mask_BL][None]
    return token_logprobs(logits_1RV, tokens_1R, temperature, with_entropy=False)[0][0]
