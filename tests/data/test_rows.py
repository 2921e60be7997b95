"""Rows from each format, and what is said of bad ones."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from distrl.data.errors import DataError
from distrl.data.rows import (
    column,
    prompt_column,
    ratings_column,
    read_rows,
    responses_column,
    text_column,
)

ROWS = [
    {"prompt": "one", "responses": ["a", "b"], "ratings": [1.0, 2.5]},
    {"prompt": "zwei é", "responses": ["c", ""], "ratings": [0.0, -1.0]},
]


def as_parquet(folder: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    return folder / "rows.parquet"


def as_dataset(folder: Path) -> Path:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "rows")
    return folder / "rows"


@pytest.mark.parametrize("write", [as_parquet, as_dataset])
def test_columnar_formats_give_rows_as_they_were(write: Any, tmp_path: Path) -> None:
    path = write(tmp_path)
    assert list(read_rows(path)) == [(f"{path}:{i}", row) for i, row in enumerate(ROWS, 1)]


def test_jsonl_counts_lines_and_passes_over_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": "\xc3\xa9\xe2\x80\xa8"}')
    assert list(read_rows(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": "é\u2028"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no rows"),
        (b"\n \n", "has no rows"),
        (b'{"a": 1}\n{"a": \n', r"rows\.jsonl:2: not JSON: .*column"),
        (b'{"a": 1}\n\n[1, 2]\n', r"rows\.jsonl:3: a row is an object .*list \[1, 2\]"),
        (b'{"a": "\xe9"}\n', r"rows\.jsonl:1: not UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"rows\.jsonl:1: not JSON"),
    ],
)
def test_bad_jsonl_is_told_with_its_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(path))


def test_missing_file_and_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl does not exist; data\.source"):
        list(read_rows(tmp_path / "nothing.jsonl"))
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"rows\.csv is none of: a \.jsonl"):
        list(read_rows(tmp_path / "rows.csv"))


def test_folders_and_files_that_are_not_what_they_seem(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="not a Hugging Face dataset on disk"):
        list(read_rows(tmp_path / "empty"))
    (tmp_path / "torn.parquet").write_bytes(as_parquet(tmp_path).read_bytes()[:100])
    with pytest.raises(DataError, match=r"torn\.parquet cannot be read as Parquet"):
        list(read_rows(tmp_path / "torn.parquet"))
    several = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    several.save_to_disk(tmp_path / "several")
    with pytest.raises(DataError, match="several splits; name one folder of: train"):
        list(read_rows(tmp_path / "several"))


def test_missing_column_lists_the_columns_there_are() -> None:
    with pytest.raises(DataError, match=r"f:7: no column 'prompt'; the columns are: a, b"):
        column({"b": 1, "a": 2}, "prompt", "f:7")


@pytest.mark.parametrize("value", [None, 3, ["x"], "", "\ud800"])
def test_text_column_takes_text_alone(value: Any) -> None:
    with pytest.raises(DataError, match=r"f:7: column 'prompt'"):
        text_column({"prompt": value}, "prompt", "f:7")


def test_prompt_is_text_or_messages() -> None:
    messages = [{"role": "user", "content": "hi", "extra": 1}]
    row = {"prompt": "hi", "messages": messages}
    assert prompt_column(row, "prompt", "f:7", chat=False) == "hi"
    as_chat = ({"role": "user", "content": "hi"},)
    assert prompt_column(row, "prompt", "f:7", chat=True) == as_chat
    assert prompt_column(row, "messages", "f:7", chat=True) == as_chat
    with pytest.raises(DataError, match=r"f:7: .*set data\.chat to true"):
        prompt_column(row, "messages", "f:7", chat=False)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["hi"],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": 1, "content": "hi"}],
        [{"role": "user", "content": "\udc00"}],
    ],
)
def test_malformed_messages_are_refused(messages: Any) -> None:
    with pytest.raises(DataError, match=r"f:7: .*'prompt'"):
        prompt_column({"prompt": messages}, "prompt", "f:7", chat=True)


@pytest.mark.parametrize("value", [None, "ab", ["a"], ["a", 1], ["a", None], ["a", "\ud800"]])
def test_responses_are_two_texts_or_more(value: Any) -> None:
    with pytest.raises(DataError, match=r"f:7: column 'r'"):
        responses_column({"r": value}, "r", "f:7")


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1],
        [1, 2, 3],
        [1, "2"],
        [1, True],
        [1, float("nan")],
        [1, float("inf")],
        [1, 10**400],
        [1, 1e39],
    ],
)
def test_ratings_are_one_finite_number_a_response(value: Any) -> None:
    with pytest.raises(DataError, match=r"f:7: "):
        ratings_column({"r": value}, "r", "f:7", count=2)


def test_good_responses_and_ratings() -> None:
    assert responses_column(ROWS[1], "responses", "f:2") == ("c", "")
    assert ratings_column(ROWS[1], "ratings", "f:2", count=2) == (0.0, -1.0)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_file_that_may_not_be_read_is_told(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_text("{}")
    refused = PermissionError(errno.EACCES, "Permission denied", str(path))

    def refuse(*_: Any, **__: Any) -> Any:
        raise refused

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", refuse)
    with pytest.raises(DataError, match=rf"^{path} cannot be read.*Permission denied"):
        list(read_rows(path))
    monkeypatch.setattr(Path, "exists", refuse)  # as in a folder that may not be entered
    with pytest.raises(DataError, match=rf"^{path} cannot be read: Permission denied; let this"):
        list(read_rows(path))
