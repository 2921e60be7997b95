"""Known answers, and the double precision they are compared in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def vectors() -> dict[str, Any]:
    """Numbers worked out from the papers' formulas, each with its source."""
    return json.loads((Path(__file__).parent / "vectors.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def close() -> Callable[[Any, Any], None]:
    def compare(actual: Any, expected: Any) -> None:
        actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
        torch.testing.assert_close(
            actual, expected.to(actual.dtype), rtol=1e-9, atol=1e-9, equal_nan=False
        )

    return compare
