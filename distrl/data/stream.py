"""An endless stream of prompts that can be taken up again at any place."""

from __future__ import annotations

from collections.abc import Sequence

from distrl.data.errors import DataError
from distrl.data.order import permutation
from distrl.data.sources import PromptRow
from distrl.records import Prompt


class PromptStream:
    """Each row once an epoch, in an order that (seed, epoch) decides.

    What is issued depends on the rows, the seed and the cursor alone, so `seek` needs no
    replay: prompt i is row permutation(seed, i // n)[i % n] of n rows.
    """

    def __init__(self, rows: Sequence[PromptRow], *, seed: int) -> None:
        if not rows:
            raise DataError("a prompt stream needs at least one prompt")
        self._rows = rows
        self._seed = seed
        self._cursor = 0
        self._epoch = 0
        self._order = permutation(len(rows), seed, 0)

    @property
    def cursor(self) -> int:
        """Prompts issued so far, which is the index of the next one."""
        return self._cursor

    def seek(self, cursor: int) -> None:
        """Go on as if `cursor` prompts had been issued, forwards or backwards."""
        if cursor < 0:
            raise ValueError(f"a cursor counts prompts issued, from 0; got {cursor}")
        self._cursor = cursor

    def next(self) -> Prompt:
        """The next prompt; `index` is its place in the whole stream, from 0."""
        epoch, place = divmod(self._cursor, len(self._rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(len(self._rows), self._seed, epoch)
        row = self._rows[self._order[place]]
        prompt = Prompt(
            index=self._cursor,
            epoch=epoch,
            prompt_id=row.prompt_id,
            text=row.text,
            token_ids=row.token_ids,
            meta=row.meta,
        )
        self._cursor += 1
        return prompt
