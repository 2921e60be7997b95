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
    """One response for each prompt, in order: [T] int32, the token that ended it included.

    It ends as a rollout does: at `eos` or at any further token that the checkpoint's generation
    settings name, as chat models come with several (Llama 3 Instruct has three, Qwen2.5 Instruct
    two, and Gemma's turns end with another than its `eos`). Else it is pure sampling at
    `temperature`: whatever those settings ask for (cuts, penalties, tokens that may not come) is
    left out, for the rollouts know none of it either. The model's training mode is put back.
    """
    ends = end_ids(model, eos)
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
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
            out += [_response(row, ends) for row in made[:, ids_BP.shape[1] :].cpu().numpy()]
    return out


def end_ids(model: PreTrainedModel, eos: int) -> list[int]:
    """The tokens that end a response: `eos`, and those that the checkpoint's generation settings
    name. vLLM takes the same ones from the same folder, also with `generation_config="vllm"`."""
    own = model.generation_config and model.generation_config.eos_token_id
    named = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({eos, *named})


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


def _response(row: np.ndarray, ends: list[int]) -> Int32s:
    """Up to and with the first token that ends it; what follows is padding."""
    places = np.flatnonzero(np.isin(row, ends))
    return row[: places[0] + 1 if len(places) else None].astype(np.int32)
