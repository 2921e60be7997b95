"""What a run's PPO began from, in a few digests: a checkpoint goes on from nothing else.

Under another tokenizer, policy or reward model, its token ids, its KL and its rewards would mean
something else, and no number would look wrong. Nor would one of an evaluation or a replay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from distrl.checkpoint import Checkpoint, Checkpoints, RunDir, RunDirError
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
    return policy_origin(config, policy) | {
        f"reward model {name!r}": model_digest(folder) for name, folder in models.items()
    }


def policy_origin(config: Config, policy: Path) -> dict[str, str]:
    """The part of `origin_of` that is the policy's own."""
    tokenizer = load_tokenizer(policy)
    origin = {"tokenizer": tokenizer_fingerprint(tokenizer), "policy": model_digest(policy)}
    if config.data.chat:
        origin["chat template"] = sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest()
    return origin


def check_origin(checkpoint: Checkpoint, now: Mapping[str, str]) -> None:
    """Raise RunDirError where the run that wrote `checkpoint` began from something else than what
    is there now. What it does not say (an earlier version's) is taken as it is."""
    if others := changed(checkpoint.state, now):
        raise RunDirError(
            f"{checkpoint.path} is of a run that began with another {others} than is there now, "
            "and cannot go on with it. Put back what it began with, or begin anew with what is "
            "there by --fresh or by another --run.name"
        )


def check_same_start(directory: RunDir, now: Mapping[str, str], what: str) -> None:
    """Raise RunDirError where `what` would look at a run from something else than it began with,
    as far as its newest checkpoint says."""
    state = Checkpoints(directory.checkpoints).newest_state()
    if state is not None and (others := changed(state, now)):
        raise RunDirError(
            f"{directory.path} began with another {others} than is there now, so {what} would say "
            "nothing of it. Put back what it began with"
        )


def changed(state: Mapping[str, Any], now: Mapping[str, str]) -> str:
    """Names of what is `now` otherwise than a checkpoint's `state` says; empty where nothing is."""
    then: dict[str, str] = state.get("origin") or {}
    return ", another ".join(name for name in sorted(then.keys() & now) if then[name] != now[name])


def model_digest(folder: Path) -> str:
    """SHA-256 over what a model's files of weights are called, their sizes and blocks spread over
    each, and over what distrl says of it. Of a copy it is the same, and of another training of
    the same kind of model it is not; it takes no longer for a large one."""
    digest = sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob(META_FILE)]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        stride = max(BLOCK, size // BLOCKS)
        with file.open("rb") as opened:
            for start in range(0, size, stride):
                opened.seek(start)
                digest.update(opened.read(BLOCK))
    return digest.hexdigest()
