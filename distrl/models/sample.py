"""Plain sampling through transformers, for the few samples that need no engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from distrl.records import Int32s


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Int32s],
    *,
    max_new_tokens: int,
    temperature: float,
    eos: int,
    seed: int,
    batch: int = 64,
) -> list[Int32s]:
    """One response for each prompt, in order: [T] int32, the end-of-sequence token included.

    Pure sampling at `temperature`: whatever the checkpoint's own generation settings ask for
    (cuts, penalties, tokens that may not come) is left out, for the rollouts know none of it
    either. The model's training mode is put back.
    """
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    device = next(model.parameters()).device
    out: list[Int32s] = []
    with torch.random.fork_rng(), _as_it_is(model):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch):
            ids_BP, mask_BP = _pad_left(prompts[start : start + batch], eos)
            made = cast(Any, model).generate(
                ids_BP.to(device), attention_mask=mask_BP.to(device), generation_config=settings
            )
            out += [_response(row, eos) for row in made[:, ids_BP.shape[1] :].cpu().numpy()]
    return out


@contextmanager
def _as_it_is(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model is in evaluation mode and has no generation settings: what a caller does
    not set, `generate` would take from there."""
    own, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(training)


def _pad_left(prompts: Sequence[Int32s], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids in prompts)
    ids_BP = np.full((len(prompts), width), pad, dtype=np.int64)
    mask_BP = np.zeros_like(ids_BP)
    for row, ids in enumerate(prompts):
        ids_BP[row, width - len(ids) :] = ids
        mask_BP[row, width - len(ids) :] = 1
    return torch.from_numpy(ids_BP), torch.from_numpy(mask_BP)


def _response(row: np.ndarray, eos: int) -> Int32s:
    """Up to and with the first end-of-sequence token; what follows it is padding."""
    ends = np.flatnonzero(row == eos)
    return row[: ends[0] + 1 if len(ends) else None].astype(np.int32)
