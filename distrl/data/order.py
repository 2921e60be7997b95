"""Orders that a seed decides, the same on every machine and with every numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def permutation(n: int, seed: int, epoch: int = 0) -> NDArray[np.int64]:
    """[n] a shuffle of 0..n-1, by (seed, epoch) alone.

    It sorts raw Philox output: numpy promises the bits of its bit generators for good, but
    not what `Generator.permutation` makes of them, and a resumed run must not depend on that.
    """
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(n), kind="stable")
