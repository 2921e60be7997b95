"""Policies: a new small Llama, or a Hugging Face checkpoint folder; safetensors both ways."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from distrl.config import ModelConfig
from distrl.errors import UserError
from distrl.models.folder import META_FILE, replacing

# Progress is the caller's to show; these bars would cut through it at every load and save.
transformers_logging.disable_progress_bar()


class ModelError(UserError, ValueError):
    """A model cannot be loaded or used; the message names the folder and the fix."""


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The one id that ends a sequence. Raises ModelError where the tokenizer has none."""
    if not isinstance(tokenizer.eos_token_id, int):
        raise ModelError("the tokenizer has no end-of-sequence token; set eos_token in its folder")
    return tokenizer.eos_token_id


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def new_llama(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> LlamaForCausalLM:
    """A Llama from nothing, float32, with tied embeddings; the seed alone decides its weights."""
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        intermediate_size=config.feed_forward,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=eos_id(tokenizer),
        pad_token_id=cast(int, tokenizer.pad_token_id),
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(llama)


def load_policy(
    folder: Path | str, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """The causal language model in `folder`, in float32 and evaluation mode, on the CPU.

    Local files only, and no code from the checkpoint is run. Raises ModelError where the
    folder holds no model, or where `tokenizer` (if given) has ids that the model lacks.
    """
    folder = checked_folder(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"cannot load the policy in {folder}: {error}") from error
    if tokenizer is not None:
        check_vocab(model, tokenizer, folder)
    _mend_settings(model)
    return model.eval()


def _mend_settings(model: PreTrainedModel) -> None:
    """Some checkpoints set a temperature and do not say that they sample: transformers reads them
    and will not write them again."""
    settings = model.generation_config
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | str,
    state: dict[str, torch.Tensor] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write model and tokenizer to `folder` in Hugging Face's layout, safetensors, whole or not at
    all. `state`: weights to write instead of the model's own, under the names of its checkpoint.
    `meta`: what is written beside them, as `META_FILE`.
    Raises ModelError where a weight is not finite: such a policy would sample rubbish."""
    check_finite(model.state_dict() if state is None else state)
    with replacing(Path(folder)) as new:
        model.save_pretrained(new, state_dict=state)
        tokenizer.save_pretrained(new)
        if meta is not None:
            (new / META_FILE).write_text(json.dumps(meta, indent=2) + "\n")


def positions(folder: Path) -> int | None:
    """That the model in `folder` can read; None where its config does not say. ModelError where it
    holds none."""
    try:
        config = AutoConfig.from_pretrained(checked_folder(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no model that transformers knows: {error}") from error
    return context_of(config)


def context_of(config: Any) -> int | None:
    """Positions that a model of this configuration can read; None where it does not say."""
    # Under this name whatever a kind of models calls it, and of the part that reads text.
    return getattr(config.get_text_config(), "max_position_embeddings", None)


AFTER_HEAD = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)
"""What configurations call something that is done to logits."""


def after_head(config: Any) -> list[str]:
    """What a model's configuration says of its logits, beyond what the head makes of them."""
    values = {name: getattr(config, name, None) for name in AFTER_HEAD}
    return [f"{name}={value}" for name, value in values.items() if value not in (None, 1, 1.0)]


def check_kind(folder: Path) -> None:
    """ModelError where a policy of such a kind cannot be trained; no weight is read."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"no policy can be made of {folder}: {error}") from error
    if found := after_head(config.get_text_config()):
        raise ModelError(
            f"the policy in {folder} does something to its logits after the head "
            f"({', '.join(found)}), which the learner does not know; choose another model"
        )


def short_range(folder: Path) -> int | None:
    """Positions up to which rotary frequencies are the same in each pass; None: all of them. Beyond
    it, `longrope` takes others, by the longest sequence of a pass (Ding et al. 2024), and engines
    by the longest that they may be asked for."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    before = getattr(config, "original_max_position_embeddings", None)
    return rope.get("original_max_position_embeddings") or before


def checked_folder(folder: Path | str) -> Path:
    """`folder`, if it is one with a config.json; ModelError says what is missing otherwise."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"no model folder {folder}; give a folder on this machine")
    if not (folder / "config.json").is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"{folder} holds no config.json, so it is not a Hugging Face checkpoint; "
            f"it holds {there}"
        )
    return folder


def check_weights(folder: Path) -> None:
    """ModelError where a folder has no weights that are whole; only their headers are read."""
    files = sorted(checked_folder(folder).glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        raise ModelError(f"{folder} holds no *.safetensors, so there are no weights to start from")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read: {error}; copy it again") from error


def numbers_in(folder: Path) -> int:
    """Numbers in a folder's weights, of whatever precision; only their headers are read."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def check_vocab(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """ModelError where the tokenizer can give an id that has no row in the embedding."""
    rows = next(model.get_input_embeddings().parameters()).shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} ids but the model in {folder} only {rows}; "
            "use the tokenizer that was saved with the model"
        )


def check_finite(state: Mapping[str, torch.Tensor]) -> None:
    """ModelError that names the first weight holding a NaN or an infinity."""
    for name, weight in state.items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ModelError(f"weight {name} holds a NaN or an infinity; it is not saved")
