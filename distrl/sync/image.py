"""Reading a published image: what is in it, and its tensors one after another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from safetensors import safe_open

from distrl.records import TensorInfo
from distrl.sync.memory import DTYPES, held, hold

NAMES = {code: str(dtype).removeprefix("torch.") for dtype, code in DTYPES.items()}
"""From the safetensors name of a dtype to torch's."""


class Image:
    """One version, mapped into memory: it can be read after its publisher has let go of it, and
    is not written over while this object is there."""

    def __init__(self, path: str, version: int) -> None:
        """Raises OSError where the image is not there any more."""
        self._held = hold(path, version)
        self._file = safe_open(held(self._held), framework="pt", device="cpu")
        self.infos = tuple(self._info(name) for name in self._file.offset_keys())

    def _info(self, name: str) -> TensorInfo:
        part = self._file.get_slice(name)
        return TensorInfo(name=name, dtype=NAMES[part.get_dtype()], shape=tuple(part.get_shape()))

    def tensors(self, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """In the order of `infos`; each is on `device` only for as long as it is held."""
        for info in self.infos:
            yield info.name, self._file.get_tensor(info.name).to(device)
