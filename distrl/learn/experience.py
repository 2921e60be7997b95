"""A batch of rollouts as tensors: right-padded, masks from lengths, never from token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from distrl.records import RolloutBatch, Sample


@dataclass(frozen=True, kw_only=True)
class Experience:
    """B sequences of at most L tokens, with at most T response tokens each.

    Attributes:
        ids_BL: prompt then response, right-padded with 0.
        prompt_lengths_B, response_lengths_B: tokens of each.
        tokens_BT: the response alone, left-aligned.
        behaviour_BT: log-probabilities by the policy that sampled, nats.
        versions_BT: the version that sampled each token.
        scores_B: the reward, before the KL leash.
        samples_1: responses of each prompt; those of a prompt follow one another.
    """

    ids_BL: Tensor
    prompt_lengths_B: Tensor
    response_lengths_B: Tensor
    tokens_BT: Tensor
    behaviour_BT: Tensor
    versions_BT: Tensor
    scores_B: Tensor
    samples_1: Tensor

    @property
    def samples(self) -> int:
        return int(self.samples_1)

    @property
    def mask_BT(self) -> Tensor:
        """True on response tokens."""
        places_T = torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device)
        return places_T < self.response_lengths_B[:, None]

    @property
    def lengths_B(self) -> Tensor:
        return self.prompt_lengths_B + self.response_lengths_B

    def __len__(self) -> int:
        return len(self.scores_B)

    def to(self, device: torch.device) -> Experience:
        """A copy on another device."""
        return Experience(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def rows(self, index: Tensor) -> Experience:
        """The sequences at `index`, cut to the longest among them."""
        part = {f.name: getattr(self, f.name) for f in fields(self)}
        part = {k: v if k == "samples_1" else v[index] for k, v in part.items()}
        width = int((part["prompt_lengths_B"] + part["response_lengths_B"]).max())
        longest = int(part["response_lengths_B"].max())
        cut = {"ids_BL": width, "tokens_BT": longest}
        cut |= {"behaviour_BT": longest, "versions_BT": longest}
        return Experience(**{k: v[:, : cut[k]] if k in cut else v for k, v in part.items()})


def to_experience(batch: RolloutBatch) -> Experience:
    """The tensors of a batch, sequences in the order of groups and samples."""
    prompts: list[np.ndarray] = []
    samples: list[Sample] = []
    scores: list[float] = []
    for group in batch.groups:
        for sample, score in zip(group.rollout.samples, group.scores, strict=True):
            prompts.append(group.rollout.prompt.token_ids)
            samples.append(sample)
            scores.append(score.value)
    whole = [np.concatenate([p, s.token_ids]) for p, s in zip(prompts, samples, strict=True)]
    return Experience(
        ids_BL=_padded(whole, torch.long),
        prompt_lengths_B=torch.tensor([len(p) for p in prompts]),
        response_lengths_B=torch.tensor([len(s.token_ids) for s in samples]),
        tokens_BT=_padded([s.token_ids for s in samples], torch.long),
        behaviour_BT=_padded([s.logprobs for s in samples], torch.float32),
        versions_BT=_padded([s.versions() for s in samples], torch.long),
        scores_B=torch.tensor(scores, dtype=torch.float32),
        samples_1=torch.tensor([len(batch.groups[0].scores)]),
    )


def _padded(rows: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        # Copies: rows out of an object store are read-only, which torch cannot express.
        [torch.tensor(row, dtype=dtype) for row in rows],
        batch_first=True,
    )
