"""Supervised fine-tuning: next-token loss on the responses, from nothing or from a checkpoint.

1. The tokenizer: the checkpoint's own, or a byte-level BPE trained on the training rows.
2. Rows become [bos] prompt response [eos]; longer ones are cut, and counted.
3. Batches of rows of like length, up to a budget of tokens (learn/loop.py trains).
4. Validation loss a token after each epoch; the policy and `report.json` at the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distrl.algo import masked_mean, token_logprobs
from distrl.config import Config
from distrl.data.batching import pad_right, token_budget_batches
from distrl.data.errors import DataError
from distrl.data.smollm2 import resolve_model
from distrl.data.sources import Demonstration, load_demonstrations
from distrl.data.tokenizer import encode_example, load_tokenizer, train_tokenizer
from distrl.learn.loop import Loss, OnStep, train
from distrl.learn.report import write_report
from distrl.models import best_device, eos_id, load_policy, new_llama, save_policy
from distrl.models.crew import ALONE, Crew, crew_for

EVALUATION_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class SFTReport:
    """What an SFT run came to.

    Attributes:
        steps: optimizer steps; `skipped` of them were not finite and changed nothing.
        train_loss: nats a response token, mean over the last epoch.
        validation_loss: nats a response token on held-out rows, at the end.
        validation_losses: the same after each epoch.
        perplexity: exp(validation_loss).
        tokens: response tokens of an epoch.
        truncated: rows, of training and validation, that were cut at `sft.max_tokens`.
        seconds: wall-clock time of it all.
    """

    steps: int
    skipped: int
    train_loss: float
    validation_loss: float
    validation_losses: tuple[float, ...]
    perplexity: float
    tokens: int
    truncated: int
    parameters: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Example:
    """ids: [T] int32; the first `prompt_tokens` of them are given, the rest is learnt."""

    ids: NDArray[np.int32]
    prompt_tokens: int


def run_sft(config: Config, out: Path, on_step: OnStep = lambda *_: None) -> SFTReport:
    """Train a policy on the demonstrations; writes `out/policy` and `out/report.json`.

    The same config and seed give the same policy on as many cores of the same machine. Raises
    ModelError, TrainingFailed, or what the data room raises for rows it cannot read.
    """
    start = time.perf_counter()
    rows = load_demonstrations(config.data, "train")
    held_out = load_demonstrations(config.data, "validation")
    model, tokenizer = starting_policy(config, rows)
    cast(nn.Module, model).to(best_device())
    examples, cut = encode(rows, tokenizer, config.sft_tokens)
    validation, cut_validation = encode(held_out, tokenizer, config.sft_tokens)
    if not examples:
        raise DataError(
            f"sft.max_tokens={config.sft_tokens} is filled by the prompt in every row, so there "
            "is no response to learn; raise it"
        )
    losses: list[float] = []

    def at_epoch_end(epoch: int) -> Mapping[str, float]:
        losses.append(validation_loss(model, validation, crew))
        return {"validation_loss": losses[-1]}

    with crew_for(model.device) as crew:
        report = train(
            model,
            lambda epoch: batches(examples, config.sft.batch_tokens, config.run.seed + epoch),
            next_token_loss,
            config.sft,
            on_step=on_step,
            on_epoch=at_epoch_end,
            crew=crew,
        )
    save_policy(model, tokenizer, out / "policy")
    sft_report = SFTReport(
        steps=report.steps,
        skipped=report.skipped,
        train_loss=report.loss,
        validation_loss=losses[-1],
        validation_losses=tuple(losses),
        perplexity=math.exp(losses[-1]),
        tokens=report.items,
        truncated=cut + cut_validation,
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=time.perf_counter() - start,
    )
    write_report(sft_report, out)
    return sft_report


def starting_policy(
    config: Config, rows: Sequence[Demonstration]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The checkpoint that `model.path` names, or a new Llama with a tokenizer trained on `rows`."""
    folder = resolve_model(config.model.path)
    if folder is not None:
        tokenizer = load_tokenizer(folder)
        return load_policy(folder, tokenizer=tokenizer), tokenizer
    texts = [row.prompt + row.response for row in rows if isinstance(row.prompt, str)]
    tokenizer = train_tokenizer(texts, config.model.vocab, config.model.context)
    return new_llama(config.model, tokenizer, config.run.seed), tokenizer


def encode(
    rows: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[list[Example], int]:
    """An example for each row that keeps a response token, and how many rows were cut."""
    examples, cut = [], 0
    for row in rows:
        ids, prompt_tokens = encode_example(tokenizer, row.prompt, row.response, max_tokens)
        cut += int(ids[-1]) != eos_id(tokenizer)
        if len(ids) > prompt_tokens:
            examples.append(Example(ids=ids, prompt_tokens=prompt_tokens))
    return examples, cut


def batches(examples: Sequence[Example], budget: int, seed: int) -> list[list[Example]]:
    """Rows of like length together, at most `budget` padded tokens each, in an order by seed."""
    plan = token_budget_batches([len(e.ids) for e in examples], budget, seed=seed)
    return [[examples[i] for i in rows] for rows in plan]


def next_token_loss(model: nn.Module, batch: Sequence[Example]) -> Loss:
    """-mean log p(token | what stands before it) over the response tokens of a batch."""
    ids_BT, targets_BT = collate(batch, next(model.parameters()).device)
    logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    logprobs_BT, _ = token_logprobs(logits_BTV, ids_BT[:, 1:], with_entropy=False)
    return Loss(mean=-masked_mean(logprobs_BT, targets_BT[:, 1:]), count=int(targets_BT.sum()))


def collate(batch: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids_BT (int64, right-padded) and targets_BT: where a response token stands that has one
    before it. Both come from lengths, so the padding's id does not matter."""
    ids_BT, lengths_B = pad_right([e.ids for e in batch], 0)
    place_T = np.arange(ids_BT.shape[1])
    first_B = np.array([max(e.prompt_tokens, 1) for e in batch])
    targets_BT = (place_T >= first_B[:, None]) & (place_T < lengths_B[:, None])
    to = partial(torch.as_tensor, device=device)
    return to(ids_BT, dtype=torch.long), to(targets_BT)


@torch.no_grad()
def validation_loss(model: nn.Module, examples: Sequence[Example], crew: Crew = ALONE) -> float:
    """Nats a response token over all of `examples`; NaN where there are none."""
    longest = max((len(example.ids) for example in examples), default=0)
    plan = batches(examples, max(EVALUATION_TOKENS, longest), seed=0)
    losses = crew.run(lambda batch: next_token_loss(model, batch), plan)
    count = sum(loss.count for loss in losses)
    return sum(loss.mean.item() * loss.count for loss in losses) / count if count else math.nan
