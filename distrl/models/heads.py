"""A causal language model's body with one number on top: reward models and critics."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from distrl.models.folder import META_FILE, replacing
from distrl.models.load import ModelError, check_finite, checked_folder, context_of
from distrl.models.packing import is_packed, token_states
from distrl.records import Int32s

HEAD_FILE = "head.safetensors"


class ScalarModel(nn.Module):
    """One number at each token: gain · (w · hidden + b) + bias.

    The head starts as N(0, 1/√(d+1)), b = 0 (Ziegler et al. 2019; Stiennon et al. 2020).
    `gain` and `bias` put a reward model's scores on a scale (mean 0, deviation 1 on the
    reference policy's samples); they are 1 and 0 until `normalise` sets them, and are
    buffers: saved with the model, never trained.

    Attributes:
        meta: what was saved beside the weights (accuracy figures, tokenizer fingerprint).
    """

    gain: Tensor
    bias: Tensor

    def __init__(
        self,
        body: PreTrainedModel,
        seed: int = 0,
        *,
        zero_head: bool = False,
        width: int | None = None,
    ) -> None:
        """width: of the body's last states, where that is not its `hidden_size`."""
        super().__init__()
        hidden = width or body.config.get_text_config().hidden_size
        self.body = body
        self.head = nn.Linear(hidden, 1)
        generator = torch.Generator().manual_seed(seed)
        std = 0.0 if zero_head else 1 / math.sqrt(hidden + 1)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(1, hidden, generator=generator) * std)
            self.head.bias.zero_()
        self.register_buffer("gain", torch.tensor(1.0))
        self.register_buffer("bias", torch.tensor(0.0))
        self.meta: dict[str, Any] = {}

    @classmethod
    def from_policy(
        cls, policy: PreTrainedModel, seed: int = 0, *, zero_head: bool = False
    ) -> ScalarModel:
        """A copy of the policy's body (its output head left out) with a fresh head.

        `zero_head` makes it answer 0 everywhere: the start for a critic that has learnt
        nothing yet, where a random head would only add noise to the first advantages.
        """
        body = cast(PreTrainedModel, policy.base_model)
        return cls(copy.deepcopy(body), seed, zero_head=zero_head, width=_width(policy))

    @classmethod
    def upon(cls, policy: PreTrainedModel) -> ScalarModel:
        """A head on the policy's own body, which both then share; it answers 0 at first."""
        body = cast(PreTrainedModel, policy.base_model)
        return cls(body, zero_head=True, width=_width(policy))

    def forward(self, ids_BT: Tensor, chosen_BT: Tensor) -> Tensor:
        """values_N, float32, on the normalised scale, after the tokens that `chosen_BT` marks;
        `ids_BT` right-padded.

        `reward` and `values` come through here, so that a sharded model's hooks run.
        """
        return self.on(token_states(self.body, ids_BT, chosen_BT))

    def on(self, hidden: Tensor) -> Tensor:
        """The number at each of the body's hidden states, [..., D] -> [...]."""
        raw = self.head(hidden.to(self.head.weight.dtype)).squeeze(-1).float()
        return self.gain * raw + self.bias

    def values(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """values_BT: a value after reading each token; 0 at and beyond the row's length."""
        place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        inside_BT = place_T < lengths_B.unsqueeze(1)
        values_N = self(ids_BT, inside_BT)
        return values_N.new_zeros(ids_BT.shape).masked_scatter(inside_BT, values_N)

    def reward(self, ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """scores_B, read at each row's last token (place length - 1).

        The rows should be `reward_input`s. Raises ValueError on an empty row.
        """
        if int(lengths_B.min()) < 1:
            raise ValueError("a sequence without tokens has no reward")
        if is_packed(self.body):  # its last layer has less to do where less is read
            place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
            return self(ids_BT, place_T == lengths_B.unsqueeze(1) - 1)
        values_BT = self.values(ids_BT, lengths_B)
        return values_BT.gather(1, (lengths_B.long() - 1).unsqueeze(1)).squeeze(1)

    def normalise(self, gain: float, bias: float) -> None:
        """From now on answer gain · raw + bias, raw being the head's own output."""
        if not (math.isfinite(gain) and math.isfinite(bias) and gain > 0):
            raise ValueError(f"gain must be positive and both finite; got {gain}, {bias}")
        self.gain.fill_(gain)
        self.bias.fill_(bias)

    @property
    def context(self) -> int | None:
        """Positions that the body can read; None where its config does not say."""
        return context_of(self.body.config)

    def save(
        self, folder: Path | str, tokenizer: PreTrainedTokenizerBase, meta: Mapping[str, Any]
    ) -> None:
        """Write `folder`, whole or not at all: the body and the tokenizer as Hugging Face saves
        them, the head beside them, `meta` and the scale in `distrl.json`. No pickle.

        Raises ModelError where a weight is not finite.
        """
        check_finite(self.state_dict())
        head = {name: weight.contiguous() for name, weight in self.head.state_dict().items()}
        scale = {"gain": float(self.gain), "bias": float(self.bias)}
        with replacing(Path(folder)) as new:
            self.body.save_pretrained(new)
            tokenizer.save_pretrained(new)
            save_file(head, new / HEAD_FILE)
            (new / META_FILE).write_text(json.dumps({**meta, **scale}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path | str) -> ScalarModel:
        """What `save` wrote, on the CPU in evaluation mode and in float32.

        Raises ModelError where the folder is not one that `save` wrote.
        """
        folder = checked_folder(folder)
        try:
            meta = json.loads((folder / META_FILE).read_text())
            head = load_file(folder / HEAD_FILE)
            body = AutoModel.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="sdpa",
                local_files_only=True,
                trust_remote_code=False,
            )
            model = cls(body, width=head["weight"].shape[1])
            model.head.load_state_dict(head)
            model.normalise(meta["gain"], meta["bias"])
            with torch.no_grad():
                model.eval()(
                    torch.zeros((1, 1), dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
                )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"{folder} holds no reward model ({error}); make one with 'distrl reward-model'"
            ) from error
        model.meta = meta
        return model.eval()


def _width(policy: PreTrainedModel) -> int | None:
    """What a policy's head reads: some project their last states down to it."""
    return getattr(policy.get_output_embeddings(), "in_features", None)


def reward_input(ids: Int32s, eos: int, limit: int | None = None) -> Int32s:
    """What a reward model reads: prompt and response, ending in one end-of-sequence token.

    A finished response ends in `eos` already; one that was cut by length, or ended at another
    token of those that end the model's responses (`sample.end_ids`), gets it here, so that scores
    are always read at the token they were trained at. Training and scoring both go through this
    function. A row that fills all `limit` positions stays as it is.

    ids: [T] integers. Returns int32. Raises ValueError where the row is empty or longer than
    `limit`.
    """
    ids = np.asarray(ids, dtype=np.int32)
    if not len(ids) or (limit is not None and len(ids) > limit):
        raise ValueError(f"a reward model that reads 1 to {limit} tokens cannot read {len(ids)}")
    if ids[-1] == eos or len(ids) == limit:
        return ids
    return np.append(ids, np.int32(eos))
