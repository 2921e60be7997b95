"""The double precision that known answers are compared in, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


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
