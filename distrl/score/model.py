"""Rewards by a trained reward model, batched across groups."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from distrl.data.batching import balanced, micro_batches, pad_right, token_budget_batches
from distrl.data.rows import Messages
from distrl.data.tokenizer import encode_example, load_tokenizer, tokenizer_fingerprint
from distrl.models import ScalarModel, eos_id, reward_input
from distrl.models.compiling import compile_layers
from distrl.models.crew import ALONE, Crew
from distrl.models.packing import pack
from distrl.records import Float32s, Int32s, Rollout
from distrl.roles import ScoreFailed

log = logging.getLogger(__name__)


class ModelReward:
    """Normalised scores of a reward model.

    Token ids go from the engine to the model as they are. Only where the model was trained
    with another tokenizer than the policy's is text encoded again, with its own tokenizer;
    `re_encodes` tells, and the log says so once.
    """

    def __init__(
        self,
        name: str,
        folder: Path | str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        crew: Crew = ALONE,
        compile: bool = False,
    ) -> None:
        """Load the model in `folder`. `tokenizer` is the policy's; `crew`'s forward passes hold at
        most `batch_tokens` together (a longer sequence goes alone); `dtype`: of its body, the
        head stays in float32; `compile`: its layers, at the first pass. Raises ModelError."""
        self.name = name
        self.model = ScalarModel.load(folder).to(device)
        self._packed = pack(self.model.body)  # tried in float32, which tells rounding from a fault
        nn.Module.to(self.model.body, getattr(torch, dtype))
        if compile:
            compile_layers(self.model, torch.device(device))
        self.batch_tokens, self.crew = batch_tokens, crew
        own = load_tokenizer(folder)
        self.re_encodes = tokenizer_fingerprint(own) != tokenizer_fingerprint(tokenizer)
        self._tokenizer = own
        self._eos = eos_id(own)
        if self.re_encodes:
            log.warning(
                "reward model %s has another tokenizer than the policy: it reads text, encoded "
                "again, and not the policy's own tokens",
                folder,
            )

    def scores(self, rollouts: Sequence[Rollout]) -> list[list[float] | ScoreFailed]:
        """For each group a score a sample, or why there is none. All samples of all groups
        share forward passes; a failing pass fails every group in the call, and a sequence beyond
        the model's context fails its own."""
        sequences = [self._sequences(rollout) for rollout in rollouts]
        fits = [self._fit(those) for those in sequences]
        read = [ids for those, fit in zip(sequences, fits, strict=True) if fit for ids in those]
        try:
            rest = iter(self.score_ids(read).tolist())
        except (RuntimeError, ValueError, IndexError) as error:
            cause = f"reward {self.name!r}: {type(error).__name__}: {error}"
            return [ScoreFailed(cause) for _ in rollouts]
        return [
            self._checked(rollout, list(islice(rest, len(rollout.samples))))
            if fit
            else ScoreFailed(
                f"reward {self.name!r} reads 1 to {self.model.context} tokens, and a sample of "
                f"prompt {rollout.prompt.prompt_id!r} has more; shorten generate.max_new_tokens or "
                "data.max_prompt_tokens"
            )
            for rollout, fit in zip(rollouts, fits, strict=True)
        ]

    def _fit(self, sequences: Sequence[Int32s]) -> bool:
        return max(map(len, sequences)) <= (self.model.context or math.inf)

    @torch.no_grad()
    def score_ids(self, sequences: Sequence[Int32s]) -> Float32s:
        """[N] float32 scores of whole sequences (prompt and response) in this model's own tokens.

        Raises ValueError for a sequence beyond the model's context.
        """
        rows = [reward_input(ids, self._eos, self.model.context) for ids in sequences]
        scores_N = np.empty(len(rows), dtype=np.float32)
        device = self.model.head.weight.device

        def read(places: list[int]) -> None:
            ids_BT, lengths_B = pad_right([rows[i] for i in places], 0)
            ids = torch.as_tensor(ids_BT, dtype=torch.long, device=device)
            lengths = torch.as_tensor(lengths_B, device=device)
            scores_N[places] = self.model.reward(ids, lengths).float().cpu().numpy()

        self.crew.run(read, list(self._batches([len(ids) for ids in rows])))
        return scores_N

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Which sequences share a pass: each of the crew has as many tokens as the others, in one
        pass where they fit; in more where that saves pads, which a packed model does not read."""
        budget = max(self.batch_tokens // self.crew.size, max(lengths, default=0))
        for share in balanced(lengths, self.crew.size):
            theirs = [lengths[place] for place in share]
            if self._packed:
                parts = token_budget_batches(theirs, budget, seed=0)
            else:
                parts = micro_batches(theirs, budget)
            yield from ([share[place] for place in part] for part in parts)

    def _sequences(self, rollout: Rollout) -> list[Int32s]:
        prompt = rollout.prompt
        if self.re_encodes:
            chat = prompt.meta.get("messages")  # a row's own column of that name would be a list
            source = chat if isinstance(chat, tuple) else prompt.text
            return [self._encode(source, sample.text) for sample in rollout.samples]
        return [np.concatenate([prompt.token_ids, s.token_ids]) for s in rollout.samples]

    def _encode(self, prompt: str | Messages, response: str) -> Int32s:
        """All of it: what is too long to be read is refused, never cut."""
        ids, _ = encode_example(self._tokenizer, prompt, response, sys.maxsize)
        return ids

    def _checked(self, rollout: Rollout, values: list[float]) -> list[float] | ScoreFailed:
        if np.isfinite(values).all():
            return values
        return ScoreFailed(
            f"reward {self.name!r} gave {values}, not all finite, for prompt "
            f"{rollout.prompt.prompt_id!r}"
        )
