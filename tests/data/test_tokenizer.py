"""Tokenizers: trained, loaded, compared, and what they make of prompts and examples."""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from distrl.data.errors import DataError
from distrl.data.tokenizer import (
    encode_example,
    encode_prompt,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)

Templated = Callable[[str | dict[str, str]], PreTrainedTokenizerFast]

PLAIN = ["the cat sat on the mat", "the dog sat on the cat"] * 5


@pytest.fixture
def tokenizer_of(tokenizer: PreTrainedTokenizerFast) -> Templated:
    """The tokenizer with a chat template, or several by name."""

    def made(template: str | dict[str, str]) -> PreTrainedTokenizerFast:
        own = copy.deepcopy(tokenizer)
        own.chat_template = template
        return own

    return made


def test_special_tokens_and_size(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 600
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|bos|>", "<|eos|>", "<|pad|>"]
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (0, 1, 2)
    assert tokenizer.model_max_length == 128


def test_any_text_survives(tokenizer: PreTrainedTokenizerFast) -> None:
    @settings(max_examples=50)
    @given(st.text(max_size=40))
    def survives(text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text

    survives()


@pytest.mark.slow
def test_training_is_the_same_in_another_process(tokenizer: PreTrainedTokenizerFast) -> None:
    program = (
        "from distrl.data.reviews import load_reviews\n"
        "from distrl.data.tokenizer import *\n"
        "texts = [r.text for r in load_reviews()[:2000]]\n"
        "print(tokenizer_fingerprint(train_tokenizer(texts, vocab=600, context=128)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == tokenizer_fingerprint(tokenizer)


def test_too_small_a_vocabulary_names_the_smallest() -> None:
    with pytest.raises(DataError, match=r"model\.vocab to 259"):
        train_tokenizer(PLAIN, vocab=258, context=16)
    assert len(train_tokenizer(PLAIN, vocab=259, context=16)) == 259


def test_saved_tokenizer_loads_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    text = "A film, isn't  it? <|eos|> é"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(" , a ' b")) == " , a ' b"


def test_missing_pad_token_stays_missing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|eos|>"
    ).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id is None


def test_fingerprint_tells_vocabularies_and_special_ids_apart(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    swapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|eos|>", eos_token="<|bos|>"
    )
    other = train_tokenizer(PLAIN, vocab=600, context=128)
    prints = {tokenizer_fingerprint(t) for t in (tokenizer, swapped, other)}
    assert len(prints) == 3


def test_folders_without_a_usable_tokenizer(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(DataError, match=r"cannot load a tokenizer from"):
        load_tokenizer(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["qwen2", "gemma", "gpt2"])
def test_a_folder_without_its_vocabulary_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eos|>"}))
    with pytest.raises(DataError, match=rf"in {tmp_path} has nothing but.*put.*tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("ends", [2, [2, 5], [0]])
def test_an_end_that_the_model_does_not_know_is_told_once(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    ends: int | list[int],
) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    load_tokenizer(tmp_path)
    load_tokenizer(tmp_path)
    (said,) = caplog.messages
    named = [ends] if isinstance(ends, int) else ends
    assert all(str(tokenizer.convert_ids_to_tokens(i)) in said for i in (1, *named))
    assert str(tmp_path) in said


@pytest.mark.parametrize(
    "settings", [None, "{", "[]", *({"eos_token_id": ends} for ends in (None, [], 1, [2, 1]))]
)
def test_of_ends_that_agree_or_are_not_named_nothing_is_said(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    settings: str | dict[str, object] | None,
) -> None:
    tokenizer.save_pretrained(tmp_path)
    if settings is not None:
        text = settings if isinstance(settings, str) else json.dumps(settings)
        (tmp_path / "generation_config.json").write_text(text)
    load_tokenizer(tmp_path)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", {"added_tokens": ...}),
        ("tokenizer.json", {"added_tokens": None}),
        ("tokenizer.json", {"model": {"type": "nothing"}}),
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"chat_template": [{"nam": "default"}]}),
    ],
)
def test_a_damaged_tokenizer_is_told_with_its_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, file: str, change: dict[str, object]
) -> None:
    tokenizer.save_pretrained(tmp_path)
    there = json.loads((tmp_path / file).read_text()) | change
    kept = {name: value for name, value in there.items() if value is not ...}
    (tmp_path / file).write_text(json.dumps(kept))
    with pytest.raises(DataError, match=rf"cannot load a tokenizer from {tmp_path}: .*tokenizer"):
        load_tokenizer(tmp_path)


def test_code_of_a_checkpoint_is_not_run(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(DataError):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_plain_prompt_begins_with_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    text, ids = encode_prompt(tokenizer, "The film")
    assert text == "The film"
    assert ids.dtype == np.int32
    assert ids[0] == 0
    assert tokenizer.decode(ids[1:]) == "The film"
    assert encode_prompt(tokenizer, "")[1].tolist() == [0]


def test_no_bos_where_the_tokenizer_has_none(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|eos|>"
    )
    _, ids = encode_prompt(bare, "The film")
    assert bare.decode(ids) == "The film"


def test_chat_prompt_is_the_template_without_a_second_bos(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    text, ids = encode_prompt(chat_tokenizer, ({"role": "user", "content": "hi"},))
    assert text == "<|bos|>user:hi<|eos|><|bos|>assistant:"
    assert chat_tokenizer.decode(ids) == text
    assert ids.tolist().count(0) == 2


def test_chat_without_template_or_refused_by_it(
    tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match="no chat template"):
        encode_prompt(tokenizer, ({"role": "user", "content": "hi"},))
    with pytest.raises(DataError, match="refuses the messages: no tools here"):
        encode_prompt(chat_tokenizer, ({"role": "tool", "content": "hi"},))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate"),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("{{ 'a'.index('b') }}", "ValueError: substring not found"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
    ],
)
def test_a_template_that_fails_is_told(tokenizer_of: Templated, template: str, said: str) -> None:
    with pytest.raises(DataError, match=rf"template fails on the messages \({said}.*mend"):
        encode_prompt(tokenizer_of(template), ({"role": "user", "content": "hi"},))


def test_of_several_templates_one_is_the_default(tokenizer_of: Templated) -> None:
    hi = ({"role": "user", "content": "hi"},)
    with pytest.raises(DataError, match=r"\(rag, tool_use\) none is the default; add the one"):
        encode_prompt(tokenizer_of({"tool_use": "x", "rag": "y"}), hi)
    assert encode_prompt(tokenizer_of({"default": "x", "rag": "y"}), hi)[0] == "x"


def test_example_is_prompt_response_and_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, prompt_len = encode_example(tokenizer, "The film", " is good", max_tokens=64)
    _, prompt_ids = encode_prompt(tokenizer, "The film")
    assert ids.dtype == np.int32
    assert ids[:prompt_len].tolist() == prompt_ids.tolist()
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[prompt_len:-1]) == " is good"


def test_long_example_is_cut_and_loses_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    whole, prompt_len = encode_example(tokenizer, "The film", " is good", max_tokens=64)
    exact, _ = encode_example(tokenizer, "The film", " is good", max_tokens=len(whole))
    assert exact.tolist() == whole.tolist()
    cut, _ = encode_example(tokenizer, "The film", " is good", max_tokens=len(whole) - 1)
    assert cut.tolist() == whole[:-1].tolist()
    full, no_response = encode_example(tokenizer, "The film", " is good", max_tokens=2)
    assert (len(full), no_response) == (2, 2)
    assert prompt_len > 2
