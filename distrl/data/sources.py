"""The three views of a data set: demonstrations, comparisons, prompts.

Each view exists for the built-in reviews and for files (`data.source`). The splits "train",
"validation" and "test" of one file are 80/10/10 by a hash of the row's prompt (of its id where
there are no prompts), so equal prompts never stand in two splits; nor do equal ids, where a
column holds them (linked.py). Where `data.validation` names held-out rows, all of the source is
"train", and those rows are both "validation" and "test". `data.limit` takes the first rows of
the split.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from distrl.config import DataConfig
from distrl.data.errors import DataError, NoRows
from distrl.data.linked import linked_splits
from distrl.data.order import permutation
from distrl.data.reviews import Review, Split, hash_number, load_reviews, split_of
from distrl.data.rows import (
    Messages,
    Row,
    answer_column,
    column,
    prompt_column,
    ratings_column,
    read_rows,
    responses_column,
    text_column,
)
from distrl.data.tokenizer import encode_prompt
from distrl.records import Int32s

REVIEWS = "reviews"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """A response to imitate. `prompt` is text, or chat messages for the template."""

    row_id: str
    prompt: str | Messages
    response: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """K >= 2 responses to one prompt, with a human rating each; larger is better."""

    row_id: str
    prompt: str | Messages
    responses: tuple[str, ...]
    ratings: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRow:
    """A prompt to roll out. `token_ids` is [P] int32; `prompt_id` is unique in its split.

    `text` and the decoded response, put together, are the whole text. `meta` has the row's
    further columns, and "messages" where the prompt is a chat.
    """

    prompt_id: str
    text: str
    token_ids: Int32s
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class _FileRow:
    """A row of one split: its place for errors, its id, and its columns."""

    where: str
    row_id: str
    columns: Row


def load_demonstrations(data: DataConfig, split: Split) -> list[Demonstration]:
    """What SFT imitates.

    Reviews: prompt "" and the whole sentence. Files: `prompt_column` (where that is set to
    "", the rows are plain text without a prompt) and `response_column`, or the assistant's turn
    that a chat ends with. A response follows its prompt directly, so plain text brings its own
    blank between them. Raises DataError.
    """
    if data.source == REVIEWS:
        reviews = _reviews(data, split)
        return [Demonstration(row_id=r.review_id, prompt="", response=r.text) for r in reviews]
    return [_demonstration(data, row) for row in _file_rows(data, split)]


def load_comparisons(
    data: DataConfig, split: Split, *, group: int, seed: int, limit: int | None = None
) -> list[Comparison]:
    """What a reward model learns from; at most `limit` responses in all.

    Reviews: sentences with prompt "", shuffled by `seed` into groups of `group`, rated by the
    mean over people; the last group may be smaller, and one left over is dropped. Files: each
    row is a group of its own size, in the order of the file: `responses_column` with
    `ratings_column`, or the two texts of `chosen_column` and `rejected_column`, rated 1 and 0. A
    row whose responses are one text, rated differently, is left out, and that is logged. Raises
    DataError.
    """
    same: list[str] = []
    if data.source == REVIEWS:
        reviews = _reviews(data, split)
        shuffled = [reviews[i] for i in permutation(len(reviews), seed)[:limit]]
        starts = range(0, len(shuffled) - 1, group)
        groups = [_compared(shuffled[start : start + group]) for start in starts]
    else:
        groups = list(_within(limit, _unlike(data, _file_rows(data, split), same)))
    if same:
        _tell_of_same(split, len(same), same[0])
    if not groups and same:
        raise DataError(
            f"in all {len(same)} {split} rows the responses are one text, rated differently, so "
            "there is nothing to compare; see the columns that the data section names"
        )
    if not groups:
        raise DataError(f"no group of two responses in the {split} rows within {limit} responses")
    return groups


def on_one_scale(data: DataConfig) -> bool:
    """Whether ratings of different groups can be compared.

    People rated each review by itself, from -4 to +4. Of a file only what stands in one row is
    known to have been compared: 1 and 0 for the better and the worse say nothing of other rows.
    """
    return data.source == REVIEWS


def load_prompts(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, split: Split
) -> list[PromptRow]:
    """What is rolled out, tokenised once and for all.

    Reviews: the first words of each sentence, as many as a hash of it draws from
    `prompt_words`; a sentence without a further word is skipped, so is a prompt longer than
    `max_prompt_tokens`, and so is a held-out one that is a training prompt word for word (sentences
    that differ may open alike). Files: `prompt_column`; there a longer one is an error. Raises
    DataError.
    """
    if data.source == REVIEWS:
        return _openings(data, tokenizer, split)
    return [_prompt_row(data, tokenizer, row, prompt) for row, prompt in _prompts(data, split)]


def check_prompts(data: DataConfig, split: Split) -> None:
    """What `load_prompts` refuses and no tokenizer is needed to see. Raises DataError."""
    if data.source == REVIEWS:
        _reviews(data, split)
        _check_words(data)
    else:
        for _ in _prompts(data, split):
            pass


def _reviews(data: DataConfig, split: Split) -> list[Review]:
    for name, is_set in (("chat", data.chat), ("validation", data.validation is not None)):
        if is_set:
            raise DataError(
                f"data.{name} does not go with the built-in reviews, which are plain text with "
                f"a split of their own; unset it, or name a file in data.source"
            )
    return list(islice((r for r in load_reviews() if split_of(r.text) == split), data.limit))


def _compared(reviews: list[Review]) -> Comparison:
    return Comparison(
        row_id="+".join(r.review_id for r in reviews),
        prompt="",
        responses=tuple(r.text for r in reviews),
        ratings=tuple(r.mean for r in reviews),
    )


def _openings(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, split: Split
) -> list[PromptRow]:
    trained = set() if split == "train" else _trained_openings(data)
    rows = []
    for review in _reviews(data, split):
        opening = _first_words(data, review)
        if opening is None or opening in trained:
            continue
        text, token_ids = encode_prompt(tokenizer, opening)
        if len(token_ids) <= data.max_prompt_tokens:
            rows.append(PromptRow(prompt_id=review.review_id, text=text, token_ids=token_ids))
    if not rows:
        raise DataError(
            f"no {split} review opens with data.prompt_words={data.prompt_words} words within "
            f"data.max_prompt_tokens={data.max_prompt_tokens}; raise the latter"
            + (f", or data.limit={data.limit}" if data.limit else "")
        )
    return rows


def _trained_openings(data: DataConfig) -> set[str]:
    """Of all training reviews, also beyond `limit`: what is held out does not depend on it."""
    trained = (review for review in load_reviews() if split_of(review.text) == "train")
    return {words for review in trained if (words := _first_words(data, review))}


def _first_words(data: DataConfig, review: Review) -> str | None:
    """A review's prompt, or None where nothing would be left to write."""
    fewest, most = _check_words(data)
    count = fewest + hash_number(review.text, "prompt_words") % (most - fewest + 1)
    words = review.text.split(" ")
    # It ends before the blank: a byte-level BPE has the blank in the first token after it.
    return " ".join(words[:count]) if len(words) > count else None


def _check_words(data: DataConfig) -> tuple[int, int]:
    fewest, most = data.prompt_words
    if not 1 <= fewest <= most:
        raise DataError(
            f"data.prompt_words={data.prompt_words} should be the fewest and the most words of a "
            "prompt, from 1 on"
        )
    return fewest, most


def _prompts(data: DataConfig, split: Split) -> Iterator[tuple[_FileRow, str | Messages]]:
    """The rows of a file that are to be rolled out, no id twice, with their prompts."""
    if not data.prompt_column:
        raise DataError("data.prompt_column is empty, so there are no prompts to roll out")
    places: dict[str, str] = {}
    for row in _file_rows(data, split):
        if row.row_id in places:
            raise DataError(f"{row.where}: id {row.row_id!r} is taken by {places[row.row_id]}")
        places[row.row_id] = row.where
        yield row, _prompt(data, row)


def _file_rows(data: DataConfig, split: Split) -> Iterator[_FileRow]:
    """The rows of `split` in the order of their file. Raises DataError where there is none."""
    held_out = None if split == "train" else data.validation
    path = data.source if held_out is None else held_out
    wanted = _belongs(data, split)
    count = 0
    for row in _rows_of(data, path):
        if wanted(row):
            count += 1
            yield row
        if count == data.limit:
            return
    if count == 0:
        raise NoRows(
            f"no row of {path} falls into the {split} split, which is by hash of the prompt (rows "
            "that share one, or an id, stay together); give more rows, or held-out rows in "
            "data.validation"
        )


def _rows_of(data: DataConfig, path: str) -> Iterator[_FileRow]:
    for where, columns in read_rows(path):
        yield _FileRow(where=where, row_id=_row_id(data, columns, where), columns=columns)


def _belongs(data: DataConfig, split: Split) -> Callable[[_FileRow], bool]:
    """Whether a row is in `split`. Prompts and ids together take a pass over all rows to say."""
    if data.validation is not None:
        return lambda _: True
    if data.id_column is None or not data.prompt_column:
        return lambda row: split_of(_split_key(data, row)) == split
    rows = _rows_of(data, data.source)
    splits = linked_splits((row.row_id, _split_key(data, row)) for row in rows)
    return lambda row: splits[row.row_id] == split


def _row_id(data: DataConfig, columns: Row, where: str) -> str:
    if data.id_column is None:
        return where.rpartition(":")[2]
    value = column(columns, data.id_column, where)
    if value is None or isinstance(value, dict | list):
        raise DataError(f"{where}: column {data.id_column!r} should be an id, found {value!r}")
    return str(value)


def _split_key(data: DataConfig, row: _FileRow) -> str:
    """What decides the split: the prompt, else the id, else all that the row has."""
    if not data.prompt_column:
        if data.id_column is not None:
            return row.row_id
        return json.dumps(row.columns, sort_keys=True, default=str)
    prompt = _prompt(data, row)
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":  # which a plain text stands for
        return prompt[0]["content"]
    return json.dumps(prompt, sort_keys=True, default=str)


def _prompt(data: DataConfig, row: _FileRow) -> str | Messages:
    return _asked(data, row)[0]


def _asked(data: DataConfig, row: _FileRow) -> tuple[str | Messages, str]:
    """The prompt, and the answer to it ("": none) where the column holds a chat that ends with one
    and the row has no further response to it."""
    if not data.prompt_column:
        return "", ""
    prompt = prompt_column(row.columns, data.prompt_column, row.where, chat=data.chat)
    further = {data.response_column, data.responses_column} & row.columns.keys()
    if isinstance(prompt, str) or len(prompt) == 1 or further:
        return prompt, ""
    *asked, last = prompt
    return (tuple(asked), last["content"]) if last["role"] == "assistant" else (prompt, "")


def _demonstration(data: DataConfig, row: _FileRow) -> Demonstration:
    prompt, answer = _asked(data, row)
    response = answer or text_column(row.columns, data.response_column, row.where)
    return Demonstration(row_id=row.row_id, prompt=prompt, response=response)


def _comparison(data: DataConfig, row: _FileRow) -> Comparison:
    columns, where, prompt = row.columns, row.where, _prompt(data, row)
    if data.chosen_column is not None and data.rejected_column is not None:
        pair = (data.chosen_column, data.rejected_column)
        responses = tuple(answer_column(columns, name, where, prompt=prompt) for name in pair)
        ratings = (1.0, 0.0)
    elif data.responses_column not in columns and {"chosen", "rejected"} <= columns.keys():
        raise DataError(
            f"{where}: no column {data.responses_column!r}; to compare 'chosen' and 'rejected', "
            "set data.chosen_column=chosen and data.rejected_column=rejected"
        )
    else:
        responses = responses_column(columns, data.responses_column, where)
        ratings = ratings_column(columns, data.ratings_column, where, count=len(responses))
    return Comparison(row_id=row.row_id, prompt=prompt, responses=responses, ratings=ratings)


def _unlike(data: DataConfig, rows: Iterator[_FileRow], same: list[str]) -> Iterator[Comparison]:
    """The rows' groups but for those that rate one text differently, whose places go to `same`."""
    for row in rows:
        group = _comparison(data, row)
        if len(set(group.responses)) == 1 < len(set(group.ratings)):
            same.append(row.where)
        else:
            yield group


@cache  # rows are checked before they are learnt from: once is enough
def _tell_of_same(split: Split, count: int, first: str) -> None:
    log.warning(
        "%d of the %s rows (the first: %s) left out of the comparisons: all their responses are "
        "one text, rated differently",
        count,
        split,
        first,
    )


def _within(limit: int | None, groups: Iterator[Comparison]) -> Iterator[Comparison]:
    """The first groups that together have no more than `limit` responses."""
    taken = 0
    for group in groups:
        taken += len(group.responses)
        if limit is not None and taken > limit:
            return
        yield group


def _prompt_row(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, row: _FileRow, prompt: str | Messages
) -> PromptRow:
    try:
        text, token_ids = encode_prompt(tokenizer, prompt)
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from error
    if not len(token_ids):
        maker = "the chat template" if data.chat else "the tokenizer"
        raise DataError(
            f"{row.where}: {maker} makes nothing of the prompt: there is no token to begin from"
        )
    if len(token_ids) > data.max_prompt_tokens:
        raise DataError(
            f"{row.where}: the prompt has {len(token_ids)} tokens, and data.max_prompt_tokens is "
            f"{data.max_prompt_tokens}; raise it or shorten the prompt"
        )
    known = {data.prompt_column, data.id_column}
    meta = {name: value for name, value in row.columns.items() if name not in known}
    if not isinstance(prompt, str):
        meta["messages"] = prompt
    return PromptRow(prompt_id=row.row_id, text=text, token_ids=token_ids, meta=meta)
