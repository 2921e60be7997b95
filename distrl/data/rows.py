"""Rows from a file: .jsonl, .parquet, or a Hugging Face dataset saved on disk.

Every row comes with its place ("file:line", from 1), and what is wrong with a row is a
DataError that begins with that place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from distrl.data.errors import DataError

Row = dict[str, Any]
Message = dict[str, str]
Messages = tuple[Message, ...]


def read_rows(path: str | Path) -> Iterator[tuple[str, Row]]:
    """("file:line", row) of each row, in order, without holding the file in memory.

    In JSON lines, empty lines are passed over; in the other formats the line is the row's
    number. Raises DataError: nothing there, unknown format, no rows, a row that is no object, a
    file that cannot be read.
    """
    path = Path(path)
    number = 0
    try:
        for number, row in _reader(path):
            where = f"{path}:{number}"
            if not isinstance(row, dict):
                raise DataError(f"{where}: a row is an object with columns, found {_kind(row)}")
            yield where, row
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}; let this user read it, or name "
            "other rows in data.source and data.validation"
        ) from error
    if number == 0:
        raise DataError(f"{path} has no rows")


def column(row: Row, name: str, where: str) -> Any:
    """What a row has in column `name`; a missing one lists the columns there are."""
    if name not in row:
        there = ", ".join(sorted(row)) or "none"
        raise DataError(
            f"{where}: no column {name!r}; the columns are: {there} (the data section of the "
            "configuration names them)"
        )
    return row[name]


def text_column(row: Row, name: str, where: str) -> str:
    """Column `name`, which must be text with something in it."""
    value = column(row, name, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: column {name!r} should be text, found {_kind(value)}")
    if not value:
        raise DataError(f"{where}: column {name!r} is empty")
    _check_unicode(value, name, where)
    return value


def prompt_column(row: Row, name: str, where: str, *, chat: bool) -> str | Messages:
    """The prompt in column `name`: text, or chat messages where `chat` is on.

    With `chat`, plain text becomes one user message.
    """
    value = column(row, name, where)
    if isinstance(value, list):
        if not chat:
            raise DataError(f"{where}: column {name!r} holds chat messages; set data.chat to true")
        return _messages(value, name, where)
    text = text_column(row, name, where)
    return ({"role": "user", "content": text},) if chat else text


def responses_column(row: Row, name: str, where: str) -> tuple[str, ...]:
    """Column `name`: a list of at least two texts. An empty text is a response like any other."""
    values = column(row, name, where)
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise DataError(
            f"{where}: column {name!r} should be a list of texts, found {_kind(values)}"
        )
    if len(values) < 2:
        raise DataError(f"{where}: column {name!r} needs two responses or more to compare")
    for value in values:
        _check_unicode(value, name, where)
    return tuple(values)


def answer_column(row: Row, name: str, where: str, *, prompt: str | Messages) -> str:
    """The response in column `name`: text, maybe empty, or chat messages that end with it.

    Messages before it are the prompt once more, or left out.
    """
    value = column(row, name, where)
    if isinstance(value, str):
        _check_unicode(value, name, where)
        return value
    if not isinstance(value, list):
        raise DataError(
            f"{where}: column {name!r} should be text or chat messages, found {_kind(value)}"
        )
    *before, last = _messages(value, name, where)
    if last["role"] != "assistant":
        raise DataError(
            f"{where}: the last message of column {name!r} should be the assistant's, found "
            f"{_kind(last)}"
        )
    asked = 1 if isinstance(prompt, str) else len(prompt)
    if before and len(before) != asked:
        raise DataError(
            f"{where}: column {name!r} has {len(before)} messages before the response, and the "
            f"prompt has {asked}; give all of them as the prompt"
        )
    return last["content"]


def ratings_column(row: Row, name: str, where: str, *, count: int) -> tuple[float, ...]:
    """Column `name`: `count` finite numbers, one a response."""
    values = column(row, name, where)
    if not isinstance(values, list) or not all(_is_number(v) for v in values):
        raise DataError(
            f"{where}: column {name!r} should be a list of finite numbers, found {_kind(values)}"
        )
    if len(values) != count:
        raise DataError(f"{where}: {len(values)} numbers in {name!r} for {count} responses")
    return tuple(float(v) for v in values)


def _messages(values: list[Any], name: str, where: str) -> Messages:
    messages = []
    for place, value in enumerate(values):
        fields = (value.get("role"), value.get("content")) if isinstance(value, dict) else ()
        if not fields or not all(isinstance(field, str) for field in fields):
            raise DataError(
                f"{where}: message {place} of column {name!r} should be an object with the texts "
                f"'role' and 'content', found {_kind(value)}"
            )
        _check_unicode(value["content"], name, where)
        messages.append({"role": value["role"], "content": value["content"]})
    if not messages:
        raise DataError(f"{where}: column {name!r} has no messages")
    return tuple(messages)


LARGEST = 3.4e38
"""Of float32's numbers."""


def _is_number(value: Any) -> bool:
    # The comparison is false for NaN and infinities; ratings are kept in 32 bits.
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= LARGEST


def _check_unicode(value: str, name: str, where: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: column {name!r} has half a surrogate pair, which is no character: {error}"
        ) from None


def _kind(value: Any) -> str:
    """A value as a person would want to see it in an error: its type and its beginning."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _reader(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.exists():
        raise DataError(f"{path} does not exist; data.source and data.validation name the rows")
    if path.is_dir():
        return enumerate(_dataset(path), 1)
    if path.suffix == ".parquet":
        return enumerate(_parquet(path), 1)
    if path.suffix == ".jsonl":
        return _jsonl(path)
    raise DataError(
        f"{path} is none of: a .jsonl file, a .parquet file, a folder of datasets.save_to_disk"
    )


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    # Bytes, so that only a line feed ends a line and a bad byte is found with its line.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8: {error}") from None
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from None


def _parquet(path: Path) -> Iterator[Any]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _dataset(path: Path) -> Iterator[Any]:
    import datasets  # slow to import, and seldom needed

    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path} is not a Hugging Face dataset on disk (datasets.save_to_disk): {error}"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        raise DataError(
            f"{path} holds several splits; name one folder of: {', '.join(map(str, dataset))}"
        )
    return iter(dataset)
