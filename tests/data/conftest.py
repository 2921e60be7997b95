"""Shared by the data tests: a tokenizer trained on the real reviews, and files of rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from distrl.data.reviews import load_reviews
from distrl.data.tokenizer import train_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}{{ '<|bos|>' + m['role'] + ':' + m['content'] + '<|eos|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|bos|>assistant:' }}{% endif %}"
)

WriteRows = Callable[..., Path]


def fresh_tokenizer() -> PreTrainedTokenizerFast:
    texts = [review.text for review in load_reviews()[:2000]]
    return train_tokenizer(texts, vocab=600, context=128)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return fresh_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = fresh_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """write_rows(row, row, ..., name=...): a .jsonl file of them."""

    def write(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
