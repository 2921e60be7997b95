"""A reward model from human ratings: InstructGPT's ranking loss, then a measured scale.

1. The policy's body with a fresh scalar head (models/heads.py), read at the last token.
2. All responses of a group go through it once, without pads where the model's kind allows it;
   all their pairs make one element of the batch (Ouyang et al. 2022, section 3.5), so that no
   response is seen K-1 times an epoch.
3. Held out: accuracy by how far apart people rated a pair, and calibration. A pair is two responses
   of one group, or of any two where all ratings are on one scale (the reviews').
4. Samples of the policy itself, drawn first of all, fix gain and bias: mean 0 and deviation 1
   before RL begins.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distrl.algo import normalisation, pairwise_loss
from distrl.config import Config, RewardModelConfig
from distrl.data.batching import pad_right, token_budget_batches
from distrl.data.errors import DataError
from distrl.data.reviews import Split
from distrl.data.rows import Messages
from distrl.data.sources import Comparison, load_comparisons, load_prompts, on_one_scale
from distrl.data.tokenizer import encode_example, load_tokenizer, tokenizer_fingerprint
from distrl.learn.loop import Loss, OnStep, TrainingFailed, train
from distrl.learn.report import write_report
from distrl.learn.reward_report import Agreement, agreement, draw_pairs, gaps, plot_agreement
from distrl.models import ScalarModel, best_device, eos_id, load_policy, reward_input, sample
from distrl.models.crew import crew_for
from distrl.models.load import context_of
from distrl.models.packing import pack
from distrl.records import Float32s, Int32s

FORWARD_TOKENS = 1024
EVALUATION_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class RewardReport:
    """What a reward-model run came to.

    Attributes:
        train_loss: nats a group, mean over the last epoch.
        held_out: agreement with people's order on held-out pairs (reward_report.py).
        gain, bias: the scale; score = gain * raw + bias.
        reference_samples: policy samples that the scale was measured on.
        examples: responses trained on; `truncated` of all rows were cut at max_tokens, and `alike`
            of these left out (`told_apart`).
    """

    steps: int
    skipped: int
    train_loss: float
    held_out: Agreement
    gain: float
    bias: float
    reference_samples: int
    examples: int
    truncated: int
    alike: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Group:
    """Responses to one prompt: K rows of tokens and K human ratings, larger is better."""

    prompt: str | Messages
    ids: tuple[Int32s, ...]
    ratings_K: Float32s


def run_reward_model(
    config: Config, policy: Path, out: Path, on_step: OnStep = lambda *_: None
) -> RewardReport:
    """Train a reward model from the policy in folder `policy` on human comparisons.

    Writes `out/model`, `out/report.json` and `out/calibration.png`. Raises ModelError,
    TrainingFailed, or DataError for rows that cannot be read or give no pair to hold out.
    """
    start = time.perf_counter()
    settings, seed = config.reward_model, config.run.seed
    tokenizer = load_tokenizer(policy)
    language_model = load_policy(policy, tokenizer=tokenizer)
    cast(nn.Module, language_model).to(best_device())
    groups, cut, alike = read_groups(config, "train", tokenizer)
    held_out, cut_held_out, alike_held_out = read_groups(config, "validation", tokenizer)
    # All that rows can get wrong is behind before anything is trained.
    samples = reference_samples(config, language_model, tokenizer)
    model = ScalarModel.from_policy(language_model, seed).to(best_device())
    del language_model
    pack(model.body)
    with crew_for(next(model.parameters()).device) as crew:
        trained = train(
            model,
            lambda epoch: batches(groups, settings.groups_per_step, seed + epoch),
            lambda _, batch: group_loss(model, batch, settings),
            settings,
            on_step=on_step,
            crew=crew,
        )
    quality = judge(model, held_out, seed, across=on_one_scale(config.data))
    put_on_scale(model, samples)
    report = RewardReport(
        steps=trained.steps,
        skipped=trained.skipped,
        train_loss=trained.loss,
        held_out=quality,
        gain=float(model.gain),
        bias=float(model.bias),
        reference_samples=len(samples),
        examples=sum(len(group.ids) for group in groups),
        truncated=cut + cut_held_out,
        alike=alike + alike_held_out,
        seconds=time.perf_counter() - start,
    )
    meta = {
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "held_out": dataclasses.asdict(quality),
    }
    model.save(out / "model", tokenizer, meta)
    plot_agreement(quality, out / "calibration.png")
    write_report(report, out)
    return report


def comparisons(config: Config, split: Split) -> list[Comparison]:
    """The rows of a split that a reward model is trained or judged on. Raises DataError."""
    settings = config.reward_model
    limit = settings.max_examples if split == "train" else None
    rows = load_comparisons(
        config.data, split, group=settings.group, seed=config.run.seed, limit=limit
    )
    if split == "train":
        _check_gap((np.asarray(row.ratings, np.float32) for row in rows), settings.min_gap)
    return rows


def _check_gap(ratings: Iterable[Float32s], gap: float) -> None:
    """DataError where no two responses of a group are rated far enough apart to learn from."""
    if not any(pairs_of(ratings_K, gap)[0] for ratings_K in ratings):
        raise DataError(
            f"no two responses to one prompt are rated reward_model.min_gap={gap:g} or more apart "
            "in the train rows, so there is nothing to learn; lower it"
        )


def read_groups(
    config: Config, split: Split, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Group], int, int]:
    """The groups of a split, how many responses were cut, and how many of these are left out.

    Raises DataError for rows that cannot be read, and where the cut leaves nothing to compare.
    """
    encoded, cut = encode(comparisons(config, split), tokenizer, config.reward_model_tokens)
    groups, alike = told_apart(encoded, config.reward_model_tokens)
    if not groups:
        raise DataError(
            f"reward_model.max_tokens={config.reward_model_tokens} cuts every response of the "
            f"{split} rows before it differs from the others to its prompt, so there is nothing "
            "to learn; raise it (empty: data.max_prompt_tokens + generate.max_new_tokens)"
        )
    if split == "train":
        _check_gap((group.ratings_K for group in groups), config.reward_model.min_gap)
    else:
        _, ratings_N, _, sets = _flat(groups, across=on_one_scale(config.data))
        draw_pairs(ratings_N, sets, config.run.seed)
    return groups, cut, alike


def encode(
    rows: Sequence[Comparison], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[list[Group], int]:
    """A group for each comparison, and how many responses were cut at `max_tokens`.

    A cut response keeps its first max_tokens - 1 tokens and ends in the end-of-sequence
    token like the others: the last token is where scores are read.
    """
    eos, cut, groups = eos_id(tokenizer), 0, []
    for row in rows:
        ids = []
        for response in row.responses:
            whole, _ = encode_example(tokenizer, row.prompt, response, max_tokens)
            cut += int(whole[-1]) != eos
            kept = whole if int(whole[-1]) == eos else whole[: max_tokens - 1]
            ids.append(reward_input(kept, eos))
        ratings_K = np.asarray(row.ratings, dtype=np.float32)
        groups.append(Group(prompt=row.prompt, ids=tuple(ids), ratings_K=ratings_K))
    return groups, cut


def told_apart(groups: Sequence[Group], max_tokens: int) -> tuple[list[Group], int]:
    """The groups without responses that the cut made equal, and how many those were.

    Two responses that differ beyond `max_tokens` alone get one score whatever is learnt, and
    nothing says whose rating it should follow. A group with less than two others is left out.
    """
    kept, alike = [], 0
    for group in groups:
        cut = Counter(ids.tobytes() for ids in group.ids if len(ids) == max_tokens)
        places = [i for i, ids in enumerate(group.ids) if cut[ids.tobytes()] < 2]
        alike += len(group.ids) - len(places)
        if len(places) == len(group.ids):
            kept.append(group)
        elif len(places) > 1:
            ids = tuple(group.ids[i] for i in places)
            kept.append(Group(prompt=group.prompt, ids=ids, ratings_K=group.ratings_K[places]))
    return kept, alike


def batches(groups: Sequence[Group], size: int, seed: int) -> list[list[Group]]:
    """All groups once, in an order by seed, `size` at a time."""
    order = np.random.default_rng(seed).permutation(len(groups))
    shuffled = [groups[i] for i in order]
    return [shuffled[at : at + size] for at in range(0, len(shuffled), size)]


def group_loss(module: ScalarModel, batch: Sequence[Group], settings: RewardModelConfig) -> Loss:
    """The mean over groups of each group's mean pairwise loss; a group without a pair is left out.

    A pair is two responses rated at least `min_gap` apart (never equal). The better one should
    lead by `margin` for each point of rating between them (Llama 2's margin, made continuous).
    """
    scores = forward_rows(module, [ids for group in batch for ids in group.ids], FORWARD_TOKENS)
    losses, right = [], 0.0
    for group, scores_K in zip(batch, scores.split([len(g.ids) for g in batch]), strict=True):
        better, worse, gap = pairs_of(group.ratings_K, settings.min_gap)
        if not len(gap):
            continue
        margin = settings.margin * torch.as_tensor(gap, device=scores.device)
        losses.append(pairwise_loss(scores_K[better], scores_K[worse], margin))
        right += float((scores_K[better] > scores_K[worse]).float().mean())
    mean = torch.stack(losses).mean() if losses else scores.sum() * 0.0
    return Loss(mean=mean, count=len(losses), metrics={"accuracy": right / max(len(losses), 1)})


def pairs_of(ratings_K: Float32s, min_gap: float) -> tuple[list[int], list[int], Float32s]:
    """Places of the better and of the worse response of each pair, and their ratings' gap.

    Exactly `min_gap` apart is enough, and equal is none, whatever rounding made of it.
    """
    gap_KK, slack_KK = gaps(ratings_K[:, None], ratings_K[None, :])
    better, worse = np.nonzero((gap_KK > slack_KK) & (gap_KK >= min_gap - slack_KK))
    return better.tolist(), worse.tolist(), gap_KK[better, worse].astype(np.float32)


def forward_rows(module: ScalarModel, rows: Sequence[Int32s], budget: int) -> Tensor:
    """scores_N in the rows' order, in the graph. Rows of like length go through together: in one
    padded batch of unequal rows most of the work would be on padding."""
    device = next(module.parameters()).device
    lengths = [len(ids) for ids in rows]
    plan = token_budget_batches(lengths, max(budget, *lengths), seed=0)
    parts = []
    for places in plan:
        ids_BT, lengths_B = pad_right([rows[i] for i in places], 0)
        ids = torch.as_tensor(ids_BT, dtype=torch.long, device=device)
        parts.append(module.reward(ids, torch.as_tensor(lengths_B, device=device)))
    order = torch.as_tensor(np.argsort(np.concatenate(plan)), device=device)
    return torch.cat(parts)[order]


@torch.no_grad()
def score_rows(model: ScalarModel, rows: Sequence[Int32s]) -> Float32s:
    """[N] float32 scores of reward inputs, in order."""
    return forward_rows(model, rows, EVALUATION_TOKENS).cpu().numpy()


def put_on_scale(model: ScalarModel, samples: Sequence[Int32s]) -> None:
    """Have the scores of `samples` mean 0 and deviation 1. Raises TrainingFailed where they are all
    equal."""
    try:
        gain, bias = normalisation(torch.from_numpy(score_rows(model, samples)))
    except ValueError as error:
        raise TrainingFailed(
            f"the reward model cannot be put on a scale: {error}. Are its ratings any different?"
        ) from error
    model.normalise(float(gain), float(bias))


def judge(model: ScalarModel, groups: Sequence[Group], seed: int, *, across: bool) -> Agreement:
    """How well the model orders held-out responses, each of which is scored once.

    A pair is two responses of one group; `across`: to one prompt, whatever group they came in.
    """
    rows, ratings_N, prompts, sets = _flat(groups, across=across)
    return agreement(score_rows(model, rows), ratings_N, prompts, seed, sets)


def _flat(
    groups: Sequence[Group], *, across: bool
) -> tuple[list[Int32s], Float32s, list[str], Sequence[Hashable]]:
    """Rows, ratings_N, prompts, and the set within which it is compared, of each response."""
    rows = [ids for group in groups for ids in group.ids]
    prompts = [repr(group.prompt) for group in groups for _ in group.ids]
    places = [place for place, group in enumerate(groups) for _ in group.ids]
    ratings_N = np.concatenate([group.ratings_K for group in groups])
    return rows, ratings_N, prompts, prompts if across else places


def reference_samples(
    config: Config, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Int32s]:
    """Reward inputs sampled from the policy as RL will sample them: responses to
    `reference_prompts` training prompts drawn by seed, one each where there are so many. One that
    fills the model's context stays as it is, as the scorer leaves it."""
    eos, seed = eos_id(tokenizer), config.run.seed
    context = context_of(policy.config)
    prompts = load_prompts(config.data, tokenizer, "train")
    order = np.random.default_rng(seed).permutation(len(prompts))
    chosen = [prompts[i].token_ids for i in np.resize(order, config.reward_model.reference_prompts)]
    responses = sample(
        policy,
        chosen,
        max_new_tokens=config.generate.max_new_tokens,
        temperature=config.generate.temperature,
        eos=eos,
        seed=seed,
    )
    return [
        reward_input(np.concatenate([prompt, response]), eos, context)
        for prompt, response in zip(chosen, responses, strict=True)
    ]
