"""Rows that hang together by an id or by a prompt, and the split that each such set is in."""

from __future__ import annotations

from collections.abc import Iterable

from distrl.data.reviews import Split, hash_number, split_numbered


def linked_splits(rows: Iterable[tuple[str, str]]) -> dict[str, Split]:
    """The split of each id, from the (id, prompt) of all rows of a file.

    Neither an id nor a prompt is in two splits: rows that share one hang together, directly or
    through others, and go where the prompt of their first row goes. So ids that are unique
    leave the split as it is by prompt alone. Prompts are kept as 64-bit hashes.
    """
    places: dict[int, int] = {}
    earlier: list[int] = []
    first: dict[str, int] = {}

    def root(place: int) -> int:
        while earlier[place] != place:
            earlier[place] = earlier[earlier[place]]
            place = earlier[place]
        return place

    for row_id, prompt in rows:
        place = places.setdefault(hash_number(prompt, "split"), len(places))
        if place == len(earlier):
            earlier.append(place)
        one, other = sorted((root(place), root(first.setdefault(row_id, place))))
        earlier[other] = one
    numbers = list(places)
    return {row_id: split_numbered(numbers[root(place)]) for row_id, place in first.items()}
