"""What a run's PPO began from, in a few digests: a checkpoint goes on from nothing else.

Under another tokenizer, policy or reward model, its token ids, its KL and its rewards would mean
something else, and no number would look wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from distrl.checkpoint import Checkpoint, RunDirError
from distrl.config import Config
from distrl.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from distrl.models.folder import META_FILE

BLOCK = 2**14
BLOCKS = 256
"""How much of a file of weights is read, 4 MiB: whatever trains a model moves all of it."""


def origin_of(config: Config, policy: Path) -> dict[str, str]:
    """The digest of everything that PPO begins from, by what people call it; `score.parts` of the
    configuration name every reward model."""
    models = {part.name: Path(part.model) for part in config.score.parts if part.model is not None}
    return {
        "tokenizer": tokenizer_fingerprint(load_tokenizer(policy)),
        "policy": model_digest(policy),
    } | {f"reward model {name!r}": model_digest(folder) for name, folder in models.items()}


def check_origin(checkpoint: Checkpoint, now: Mapping[str, str]) -> None:
    """Raise RunDirError where the run that wrote `checkpoint` began from something else than what
    is there now. One that does not say is taken as it is."""
    then = checkpoint.state.get("origin")
    if then is None:
        return
    changed = [name for name in sorted(then.keys() | now) if then.get(name) != now.get(name)]
    if changed:
        raise RunDirError(
            f"{checkpoint.path} is of a run that began with another {', another '.join(changed)} "
            "than is there now, and cannot go on with it. Put back what it began with, or begin "
            "anew with what is there by --fresh or by another --run.name"
        )


def model_digest(folder: Path) -> str:
    """SHA-256 over what a model's files of weights are called, their sizes and blocks spread over
    each, and over what distrl says of it. Of a copy it is the same, and of another training of
    the same kind of model it is not; it takes no longer for a large one."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob(META_FILE)]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        stride = max(BLOCK, size // BLOCKS)
        with file.open("rb") as opened:
            for start in range(0, size, stride):
                opened.seek(start)
                digest.update(opened.read(BLOCK))
    return digest.hexdigest()
