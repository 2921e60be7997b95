"""Text to ids: a byte-level BPE of our own, or the tokenizer of a checkpoint folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distrl.data.errors import DataError
from distrl.data.rows import Messages
from distrl.records import Int32s

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

log = logging.getLogger(__name__)
_told: set[tuple[str, ...]] = set()
"""Of which tokens this process has warned: a run loads its tokenizer many times."""


def train_tokenizer(texts: Iterable[str], vocab: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Radford et al. 2019, section 2.2) of at most `vocab` tokens.

    Ids 0 to 2 are <|bos|>, <|eos|> and <|pad|>, then come the 256 bytes, then merges; short
    texts may give fewer tokens than `vocab`. Any text survives encoding and decoding
    unchanged. `context` is the longest sequence in tokens that the model will take. The same
    texts give the same tokenizer. Raises DataError where `vocab` cannot hold bytes and marks.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    marks = [BOS, EOS, PAD]
    if vocab < len(alphabet) + len(marks):
        raise DataError(
            f"a vocabulary of {vocab} cannot hold 256 bytes and {len(marks)} special tokens; "
            f"set model.vocab to {len(alphabet) + len(marks)} or more"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=marks,
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint folder; nothing is downloaded, no code of it is run.

    A missing padding token stays missing: masks come from lengths. Warns, once in a process,
    where responses would end otherwise than sequences do. Raises DataError where there is no
    tokenizer, or one without a vocabulary or an end-of-sequence token.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no tokenizer at {folder}: there is no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers has no narrower one, and broken JSON raises any
        raise DataError(
            f"cannot load a tokenizer from {folder}: {type(error).__name__}: {error}. The "
            "folder should hold tokenizer.json and tokenizer_config.json, as save_pretrained "
            "writes them"
        ) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise DataError(  # what transformers makes where the vocabulary's file is missing
            f"the tokenizer in {folder} has nothing but special tokens, so it reads nothing of a "
            "text; put the model's tokenizer.json and tokenizer_config.json there, as "
            "save_pretrained writes them"
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer in {folder} has no end-of-sequence token, so responses could not end; "
            "set eos_token in its tokenizer_config.json"
        )
    _compare_ends(tokenizer, folder)
    return tokenizer


def _compare_ends(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Warn where the model's generation_config.json names ends of responses, and the tokenizer's
    end-of-sequence token is none of them."""
    try:
        named = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or transformers will refuse it
        return
    ids = named if isinstance(named, list) else [named]
    if named in (None, []) or tokenizer.eos_token_id in ids:
        return
    ends = [str(tokenizer.convert_ids_to_tokens(i)) for i in ids]
    if (tokens := (str(tokenizer.eos_token), *ends)) not in _told:
        _told.add(tokens)
        log.warning(
            "the tokenizer in %s ends a sequence with %s, and its generation_config.json ends "
            "responses with %s: fine-tuning and the reward model would end texts as the model does "
            "not; put the model's own tokenizer_config.json there, or set its eos_token",
            folder,
            tokens[0],
            " or ".join(ends),
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the vocabulary and the special ids: equal where ids mean the same text."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    content = json.dumps([sorted(tokenizer.get_vocab().items()), special])
    return hashlib.sha256(content.encode()).hexdigest()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages) -> tuple[str, Int32s]:
    """(text, ids [P] int32) of a prompt, ready to be continued.

    Plain text: BOS, where the tokenizer has one, and the text; so an empty prompt is BOS
    alone. Chat messages: the tokenizer's template up to where the assistant speaks, without
    a further BOS, and the text is what the template made. Either way text + decode(response)
    is what the model wrote as a whole. Raises DataError where there is no template, or it
    refuses the messages or fails on them.
    """
    if isinstance(prompt, str):
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return prompt, np.asarray(bos + _encode(tokenizer, prompt), dtype=np.int32)
    if tokenizer.chat_template is None:
        raise DataError(
            "data.chat is on, but the tokenizer has no chat template; turn it off or add "
            "chat_template.jinja to the checkpoint"
        )
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise DataError(
            f"data.chat is on, and of the tokenizer's chat templates ({', '.join(sorted(named))}) "
            "none is the default; add the one to use to the checkpoint as chat_template.jinja"
        )
    try:
        text = tokenizer.apply_chat_template(
            list(prompt), tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise DataError(f"the chat template refuses the messages: {error}") from error
    except Exception as error:  # a template is a program, and may fail in any way
        raise DataError(
            f"the chat template fails on the messages ({type(error).__name__}: {error}); mend "
            "chat_template.jinja in the checkpoint"
        ) from error
    assert isinstance(text, str)
    return text, np.asarray(_encode(tokenizer, text), dtype=np.int32)


def encode_example(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, response: str, max_tokens: int
) -> tuple[Int32s, int]:
    """(ids [T] int32, prompt_len) of BOS + prompt + response + EOS.

    The loss is on ids[prompt_len:] alone. A longer row is cut to its first `max_tokens`: it
    does not end in EOS, and where the prompt fills it there is no response (prompt_len == T).
    Raises DataError as `encode_prompt` does.
    """
    _, prompt_ids = encode_prompt(tokenizer, prompt)
    rest = [*_encode(tokenizer, response), tokenizer.eos_token_id]
    ids = np.concatenate([prompt_ids, np.asarray(rest, dtype=np.int32)])[:max_tokens]
    return ids, min(len(prompt_ids), len(ids))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # Not verbose: what is too long for the model is the caller's to cut or to refuse.
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)
